"""Muon: momentum, made orthogonal."""

import math
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.optim.adam import adamw
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, slots_like
from forgather_fn.optim.partition import Match, partitioned
from forgather_fn.optim.rows import like
from forgather_fn.optim.shaped import one_by_one, take
from forgather_fn.schedules import Schedule
from forgather_fn.wide import wide

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that is iterated: the steepest at 0 that leaves singular values near 1 near 1."""

AROUND: Final = ("embed", "wte", "wpe", "lm_head", "head", "classifier", "score", "cls", "position")
"""What names of embeddings and heads have in them, in the usual models."""

Adjust = Literal["match_rms_adamw", "original", "none"]


def hidden_matrices(name: str, tensor: Tensor) -> bool:
    """Say that what has two or more dimensions is a hidden layer's, but for embeddings and heads, by their names.

    A part of the name (between dots) that begins with one of :data:`AROUND` tells them.

    Example:
        >>> weight = torch.zeros(2, 2)
        >>> [hidden_matrices(name, weight) for name in ("layers.0.mlp.weight", "embed_tokens.weight", "lm_head.weight")]
        [True, False, False]
    """
    return tensor.dim() >= 2 and not any(part.startswith(AROUND) for part in name.lower().split("."))


@described
def muon(
    *,
    momentum: float | Schedule = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    adjust: Adjust = "match_rms_adamw",
    weight_decay: float | Schedule = 0.1,
    groups: Sequence[Group] = (),
    match: Match = hidden_matrices,
    rest: Optimizer | None = None,
) -> Optimizer:
    """Update hidden matrices by Muon, and the rest (embeddings, heads, vectors) by AdamW: one composed optimizer.

    See :func:`orthogonal` for Muon itself, and :func:`~forgather_fn.optim.partition.partitioned` for how they are
    composed: its parts are ``muon`` and ``rest``.

    Args:
        momentum: As in :func:`orthogonal`; so are ``nesterov``, ``iterations``, ``coefficients``, ``eps`` and
            ``adjust``.
        nesterov: Look ahead along the momentum.
        iterations: Of Newton and Schulz.
        coefficients: Of their polynomial.
        eps: The least norm that is divided by.
        adjust: How the learning rate follows the shape. With the default, Muon and AdamW can share one.
        weight_decay: Decoupled, of Muon's matrices; a number or a schedule.
        groups: Of Muon's matrices, with hyperparameters of their own.
        match: Which parameters Muon updates, all of two or more dimensions: a pattern, several, or a predicate.
        rest: What updates the others; by default, ``adamw(betas=(0.9, 0.95), weight_decay=weight_decay)``.

    Raises:
        ValueError: A number is out of its range; or, when a state is made, ``match`` chooses a vector, or nothing.
    """
    by_muon = orthogonal(
        momentum=momentum,
        nesterov=nesterov,
        iterations=iterations,
        coefficients=coefficients,
        eps=eps,
        adjust=adjust,
        weight_decay=weight_decay,
        groups=groups,
    )
    other = adamw(betas=(0.9, 0.95), weight_decay=weight_decay) if rest is None else rest
    return partitioned({"muon": (match, by_muon), "rest": ("*", other)})


@described
def orthogonal(
    *,
    momentum: float | Schedule = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    adjust: Adjust = "match_rms_adamw",
    weight_decay: float | Schedule = 0.1,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Bring all singular values of the momentum near to 1, and follow it: Muon, for matrices alone.

    That is done by a few iterations of Newton and Schulz in bfloat16. A tensor of more than two dimensions (of a
    convolution) is taken as a matrix whose rows are its first dimension.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; equal to
    ``torch.optim.Muon``. ``match_rms_adamw``: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.

    Args:
        momentum: Decay of the running mean of gradients; a number in [0, 1) or a schedule.
        nesterov: Look ahead along the momentum.
        iterations: How many, from 1 to 99.
        coefficients: Of the polynomial ``a x + b x^3 + c x^5``.
        eps: The least norm that the momentum is divided by before.
        adjust: What the learning rate is multiplied by, for a matrix of n x m: ``"match_rms_adamw"`` by
            ``0.2 sqrt(max(n, m))``, which makes updates as large as AdamW's; ``"original"`` by
            ``sqrt(max(1, n / m))``; ``"none"`` by 1. Weight decay has the rate itself.
        weight_decay: Decoupled; a number or a schedule.
        decays: Which parameters decay; by default, all that it can update.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: A number is out of its range; or, when a state is made, a parameter has less than two dimensions.
    """
    if not (callable(momentum) or 0 <= momentum < 1):
        raise ValueError(f"muon: momentum must be a number in [0, 1) or a schedule; got {momentum}")
    if not (isinstance(iterations, int) and 1 <= iterations < 100 and len(coefficients) == 3 and 0 <= eps < math.inf):
        raise ValueError(
            "muon: iterations must be an integer from 1 to 99, coefficients three numbers, and eps at least 0; got "
            f"{iterations}, {coefficients} and {eps}"
        )
    number = named("momentum", momentum)

    def init(params: Flat) -> OptState:
        flat = [leaf.name for leaf in params.layout.leaves if len(leaf.shape) < 2]
        if flat:
            raise ValueError(
                f"muon: {flat[0]!r} has less than two dimensions; let another optimizer update it: "
                "ff.optim.muon(match=...)"
            )
        return {"momentum": slots_like(params)}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        kept, found_inf = context.valued(number), context.found_inf
        for own in one_by_one(gradients, params, context):
            mean = wide(state["momentum"][own.name])
            mean = mean + (own.gradient - mean) * like(mean, 1 - kept)
            direction = own.gradient + (mean - own.gradient) * like(mean, kept) if nesterov else mean
            take(state["momentum"][own.name], mean, found_inf)
            rows = direction.reshape(len(direction), -1)
            step = newton_schulz(rows, iterations, coefficients, eps).reshape(direction.shape).to(mean.dtype)
            value = own.value * like(mean, 1 - own.rate * own.decay)
            take(own.param, value - step * like(mean, own.rate * _adjusted(adjust, *rows.shape)), found_inf)
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, momentum=momentum)
    return Optimizer(init, update, assigner(groups, weight_decay, decays), separable=True, schedules=schedules)


def newton_schulz(matrix: Tensor, iterations: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Bring the singular values of a matrix near to 1, in bfloat16."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.bfloat16()
    found = found.T if tall else found
    found = found / found.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


def _adjusted(adjust: Adjust, rows: int, columns: int) -> float:
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else 1.0
