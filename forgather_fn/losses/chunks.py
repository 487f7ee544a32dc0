"""Losses of a large vocabulary, in chunks of elements, so that there are never all logits at one time."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.deferred import Deferred, deferring, head_of, logits
from forgather_fn.losses.terms import Terms, terms_of
from forgather_fn.mean import Mean


@described
def chunked(loss: Objective, *, tokens: int = 1024, head: str | None = None) -> Objective:
    """Compute a loss of classes in chunks, and the logits of each chunk again in the backward pass.

    The model is run as it is, but for its head, the last linear layer, which is put off: the loss is given the hidden
    states and the head's weight. So there are ``tokens * classes`` logits at a time, and not those of a whole
    microbatch with their logarithms and gradients. The results are the same up to rounding; the product with the head
    is computed once more. Tied weights are one parameter as ever. Models that scale or cap their logits
    (``tanh(logits / cap) * cap``) are honoured; whatever else is done to logits is refused when it happens.

    It comes last: around :func:`with_z_loss`, :func:`smoothed`, weights and masks, not inside them. ``program.apply``
    and exported models give logits as ever. A pipeline and a model in shards refuse it.

    Sources: chunks with recomputation as in Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, applied
    to the head, as Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, and Hsu et
    al., "Liger Kernel", arXiv 2410.10989, do in kernels.

    Args:
        loss: Such as ``causal_lm`` or ``cross_entropy``.
        tokens: Elements of a chunk.
        head: The name of the linear layer that computes the logits; None for the output embeddings of a model of
            Hugging Face.

    Raises:
        ValueError: The loss is of something else, or ``tokens`` is not positive; when the model is built or called: the
            head is not found, is no plain linear layer, or its logits are used in another way.

    Example:
        >>> from forgather_fn.losses import causal_lm, with_z_loss
        >>> chunked(with_z_loss(causal_lm), tokens=512)
        chunked(loss=with_z_loss(loss=causal_lm, coefficient=0.0001), tokens=512, head=None)
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"chunked: tokens must be an integer of at least 1, got {tokens!r}")
    terms = terms_of(loss, "chunked", classes=True)

    def total(outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor | Mean]:
        return terms.named(_sums(terms, _deferred(outputs), batch, tokens))

    def around(module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return deferring(head_of(module, head))

    return attrs.evolve(loss, total=total, around=around, passes_weight=False)


def _deferred(outputs: Any) -> Deferred:
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        found = next((item for item in outputs if isinstance(item, Deferred)), None)
    elif not isinstance(outputs, Deferred):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Deferred):
        raise ValueError(
            f"chunked: the model's outputs are {type(outputs).__name__}, in which the logits of its head are not found "
            "as they left it; the head must be the last layer. Name another, head=..., or use the loss that is not "
            "chunked"
        )
    return found


def _sums(terms: Terms, deferred: Deferred, batch: Any, tokens: int) -> list[Tensor]:
    """Sum up each part of a loss, chunk by chunk."""
    targets, weights, beside = terms.prepared(batch)
    hidden = terms.pairing.predictions(deferred.hidden, batch).flatten(0, -2)
    spread = [None if one is None else one.flatten(0, weights.dim() - 1) for one in beside]
    targets, weights = targets.flatten(0, weights.dim() - 1), weights.flatten()
    found: list[Tensor] = []
    for start in range(0, max(len(hidden), 1), tokens):
        rows = slice(start, start + tokens)
        own = [None if one is None else one[rows] for one in spread]
        run = functools.partial(_of_chunk, terms, deferred.steps, targets[rows], weights[rows], own)
        given = (hidden[rows], deferred.weight, deferred.bias)
        again = torch.is_grad_enabled()
        sums = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False) if again else run(*given)
        found = [one + other for one, other in zip(found, sums, strict=True)] if found else sums
    return found


def _of_chunk(
    terms: Terms,
    steps: tuple[Tensor | float | None, ...],
    targets: Tensor,
    weights: Tensor,
    beside: list[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor]:
    return terms.sums(logits(hidden, weight, bias, steps), targets, weights, beside)
