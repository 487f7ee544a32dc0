"""Measures of language models."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.entropy import element_entropies
from forgather_fn.losses.pairing import Paired, Pairing
from forgather_fn.losses.terms import Term, Terms
from forgather_fn.losses.weighting import beside
from forgather_fn.mean import Mean
from forgather_fn.metrics.reducer import Metric, Partial, Reducer


def _entropy(what: str, pairing: Pairing, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Give the sum of the cross-entropies in nats, and of how many elements."""
    if not pairing.classes:
        raise ValueError(f"{what}: it is of classes, and the loss is one of values")
    terms = Terms(pairing=pairing, parts=(Term(losses=element_entropies),))
    (total,) = terms.sums(pairing.predictions(outputs, batch), *terms.prepared(batch))
    return total, pairing.keep(batch).sum()


def _perplexity(pairing: Pairing) -> Reducer:
    def add(partial: Partial, outputs: Any, batch: Any, /) -> Partial:
        total, count = _entropy("perplexity", pairing, outputs, batch)
        return {"nats": partial["nats"] + total, "tokens": partial["tokens"] + count}

    def result(partial: Partial) -> Mapping[str, float]:
        tokens = int(partial["tokens"])
        return {"perplexity": float((partial["nats"] / tokens).exp()) if tokens else math.nan}

    return Reducer(
        init=lambda: {"nats": torch.zeros((), dtype=torch.float64), "tokens": torch.tensor(0)}, add=add, result=result
    )


perplexity = Paired(_perplexity, "perplexity")
"""The exponential of the mean cross-entropy, as ``perplexity``: a reducer, since no mean of perplexities is one. What a
loss adds to the cross-entropy (smoothing, z-loss, weights) is not in it; its masks are."""


@described
def bits_per_byte(*, bytes: str | Callable[[Any], Tensor]) -> Paired:
    """Take the cross-entropy in bits divided by the bytes of the text, as ``bits_per_byte``.

    It does not depend on the tokenizer, as the loss and the perplexity do. The bytes must be those of the tokens that
    count as targets: in a causal language model not of the first.

    Args:
        bytes: A key of the batch, the bytes of each sample ``[batch]`` or of each token (added up); or a function of
            the batch that gives them.

    Raises:
        ValueError: When called: there is no such key.

    Example:
        >>> import forgather_fn as ff
        >>> batch = {"labels": torch.tensor([[0, 1, 2]]), "bytes": torch.tensor([4])}
        >>> mean = ff.metrics.bits_per_byte(bytes="bytes").as_in(ff.losses.causal_lm)
        >>> float(mean(torch.zeros(1, 3, 4), batch)["bits_per_byte"])  # two tokens of two bits each in four bytes
        1.0
    """

    def counted(batch: Any) -> Tensor:
        return beside(batch, bytes, "bits_per_byte") if isinstance(bytes, str) else bytes(batch)

    def make(pairing: Pairing) -> Metric:
        def measure(outputs: Any, batch: Any, /) -> Mapping[str, Mean]:
            total, _ = _entropy("bits_per_byte", pairing, outputs, batch)
            return {"bits_per_byte": Mean(total / math.log(2), counted(batch).sum())}

        return measure

    return Paired(make)
