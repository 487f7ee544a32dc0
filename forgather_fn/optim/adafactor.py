"""Adafactor: Adam's second moment in the memory of its rows and columns."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.finite import applied
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext
from forgather_fn.optim.rows import like
from forgather_fn.optim.shaped import Own, one_by_one, take, wide_slots
from forgather_fn.schedules import Schedule

LEAST: Final = torch.finfo(torch.float32).tiny


@described
def adafactor(
    *,
    relative_step: bool = False,
    scale_parameter: bool = True,
    clip_threshold: float = 1.0,
    decay_power: float = 0.8,
    beta1: float | Schedule | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    weight_decay: float | Schedule = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Divide by the root of a second moment that is kept as the means of its rows and columns.

    Of a matrix of n x m it keeps n + m numbers, of tensors with more dimensions those of the last two; of a vector all.
    The running means decay by ``1 - t ** -decay_power``, where t counts the parameter's updates.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235. With
    ``relative_step`` and the schedule 1e-2 it is the paper's algorithm, that of ``transformers.Adafactor`` with
    ``relative_step``, and, but for where the first of ``eps`` is added, that of ``torch.optim.Adafactor``.

    Args:
        relative_step: Let the step be at most ``1 / sqrt(t)``: the plan's learning rate is the highest then.
        scale_parameter: Multiply the step by the root mean square of the parameter, at least the second of ``eps``.
        clip_threshold: The highest root mean square of an update, in units of the step.
        decay_power: How fast the running means slow down.
        beta1: Decay of a running mean of updates, which is another slot as large as the parameters; None for none.
        eps: Added to squared gradients, above 0 in float32; the least root mean square of a parameter.
        weight_decay: Times the learning rate (neither scaled nor relative), of those parameters that decay.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: A number is out of its range.
    """
    if not (callable(beta1) or beta1 is None or 0 <= beta1 < 1):
        raise ValueError(f"adafactor: beta1 must be a number in [0, 1), a schedule, or None; got {beta1}")
    if not (clip_threshold > 0 and 0 < decay_power < math.inf and len(eps) == 2 and eps[0] >= LEAST and eps[1] >= 0):
        raise ValueError(
            "adafactor: clip_threshold and decay_power must be above 0, and eps two numbers, of which the first is at "
            f"least {LEAST:.3g}: a gradient of 0 is divided by its root; got {clip_threshold}, {decay_power} and {eps}"
        )

    def init(params: Flat) -> OptState:
        layout, device = params.layout, params.buffers[0].device
        shapes = {leaf.name: leaf.shape for leaf in layout.leaves}
        factored = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
        state = {
            "rows": wide_slots(layout, {name: shape[:-1] for name, shape in factored.items()}, device),
            "columns": wide_slots(layout, {name: (*s[:-2], s[-1]) for name, s in factored.items()}, device),
            "exp_avg_sq": wide_slots(layout, {n: shape for n, shape in shapes.items() if n not in factored}, device),
            "count": torch.zeros(len(params), dtype=torch.float32, device=device),
        }
        return state if beta1 is None else {**state, "exp_avg": wide_slots(layout, shapes, device)}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        found_inf = context.found_inf
        counts = state["count"].add(1.0).double().unbind()
        for own in one_by_one(gradients, params, context):
            count = counts[own.number]
            direction = _direction(own, state, count**-decay_power, eps[0], found_inf)
            direction = direction / (_rms(direction) / clip_threshold).clamp(min=1.0)
            rate = torch.minimum(count.rsqrt(), _scalar(own.rate, count)) if relative_step else own.rate
            scale = _rms(own.value).clamp(min=eps[1]) if scale_parameter else 1.0
            step = direction * like(own.value, rate) * scale
            if beta1 is not None:
                kept, share = state["exp_avg"][own.name], context.valued(named("beta1", beta1))
                step = kept * like(step, share) + step * like(step, 1 - share)
                take(kept, step, found_inf)
            take(own.param, own.value * like(own.value, 1 - own.rate * own.decay) - step, found_inf)
        active = torch.tensor(gradients.active, dtype=torch.float32, device=state["count"].device)
        state["count"].add_(active * applied(found_inf))
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, beta1=beta1)
    return Optimizer(init, update, assigner(groups, weight_decay, decays), separable=True, schedules=schedules)


def _direction(own: Own, state: OptState, share: Tensor, eps: float, found_inf: Tensor) -> Tensor:
    """Divide the gradient by the root of its second moment, which is updated."""
    square, name, share = own.gradient * own.gradient + eps, own.name, share.to(own.gradient.dtype)
    if own.gradient.dim() < 2:
        moment = torch.lerp(state["exp_avg_sq"][name], square, share)
        take(state["exp_avg_sq"][name], moment, found_inf)
        return own.gradient * moment.rsqrt()
    rows = torch.lerp(state["rows"][name], square.mean(dim=-1), share)
    columns = torch.lerp(state["columns"][name], square.mean(dim=-2), share)
    take(state["rows"][name], rows, found_inf)
    take(state["columns"][name], columns, found_inf)
    row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
    return own.gradient * row * columns.unsqueeze(-2).rsqrt()


def _rms(tensor: Tensor) -> Tensor:
    root: Tensor = torch.linalg.vector_norm(tensor) / math.sqrt(max(tensor.numel(), 1))
    return root


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
