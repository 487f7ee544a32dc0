"""Measures of language models."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.entropy import entropy_terms
from forgather_fn.losses.pairing import Paired, Pairing
from forgather_fn.losses.terms import Terms
from forgather_fn.losses.weighting import beside
from forgather_fn.mean import Mean
from forgather_fn.metrics.base import Aggregate, Metric, Partial


def _entropy(what: str, pairing: Pairing) -> Terms:
    if not pairing.classes:
        raise ValueError(f"{what}: it is of classes, and the loss is one of values")
    return entropy_terms(pairing)


def _nats(terms: Terms, outputs: Any, batch: Any) -> Tensor:
    (total,) = terms.sums(terms.pairing.predictions(outputs, batch), *terms.prepared(batch))
    return total


def _perplexity(pairing: Pairing) -> Aggregate:
    terms = _entropy("perplexity", pairing)

    def add(partial: Partial, outputs: Any, batch: Any, /) -> Partial:
        nats, tokens = _nats(terms, outputs, batch), pairing.keep(batch).sum()
        return {"nats": partial["nats"] + nats, "tokens": partial["tokens"] + tokens}

    def result(partial: Partial) -> Mapping[str, float]:
        tokens = int(partial["tokens"])
        return {"perplexity": float((partial["nats"] / tokens).exp()) if tokens else math.nan}

    return Aggregate(
        init=lambda: {"nats": torch.zeros((), dtype=torch.float64), "tokens": torch.tensor(0)}, add=add, result=result
    )


perplexity = Paired(_perplexity, "perplexity")
"""The exponential of the mean cross-entropy, as ``perplexity``: an aggregate, as no mean of perplexities is one. What
a loss adds to the cross-entropy (smoothing, z-loss, weights) is not in it; its masks are."""


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
        terms = _entropy("bits_per_byte", pairing)

        def measure(outputs: Any, batch: Any, /) -> Mapping[str, Mean]:
            return {"bits_per_byte": Mean(_nats(terms, outputs, batch) / math.log(2), counted(batch).sum())}

        return measure

    return Paired(make)
