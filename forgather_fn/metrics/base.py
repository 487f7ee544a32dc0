"""What an evaluation measures besides the loss: means, and aggregates."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import attrs
from torch import Tensor

from forgather_fn.describe import describe
from forgather_fn.losses import Loss
from forgather_fn.losses.pairing import Paired
from forgather_fn.mean import Mean

Partial = Mapping[str, Tensor]
"""What an aggregate keeps, by name. Those of two parts of the data, added up, are that of both."""


class Metric(Protocol):
    """Measure a batch by means."""

    def __call__(self, outputs: Any, batch: Any, /) -> Mapping[str, Mean]:
        """Give sums over the batch with what they are sums over, by name."""
        ...


class AggregateInit(Protocol):
    """Begin."""

    def __call__(self) -> Partial:
        """Give what is kept before the first batch: zeros."""
        ...


class AggregateAdd(Protocol):
    """Take a batch in."""

    def __call__(self, partial: Partial, outputs: Any, batch: Any, /) -> Partial:
        """Give what is kept, with what this batch adds to it; the names and shapes stay."""
        ...


class AggregateResult(Protocol):
    """End."""

    def __call__(self, partial: Partial, /) -> Mapping[str, float]:
        """Give the numbers that are reported, by name."""
        ...


@attrs.frozen(repr=False)
class Aggregate:
    """A measure that is not the mean of measures of parts: a fold over batches, and a function of what it has kept.

    An evaluation lets ``add`` begin at ``init()`` for each batch, and adds up what it gives: counts (integers, of any
    shape) as they come, in int64; sums (floating) in the order of the batches, in float64. So the result has the same
    bits for any number of processes, and does not depend on the batch size. What cannot be added up (a maximum, a list
    of all predictions) is no aggregate.

    Attributes:
        init: Makes what is kept.
        add: Adds a batch to it.
        result: Makes numbers of it.
        description: How it prints.

    Example:
        >>> import torch
        >>> count = Aggregate(
        ...     init=lambda: {"n": torch.tensor(0)},
        ...     add=lambda kept, outputs, batch: {"n": kept["n"] + len(outputs)},
        ...     result=lambda kept: {"samples": float(kept["n"])},
        ... )
        >>> count.result(count.add(count.init(), torch.zeros(3), None))
        {'samples': 3.0}
    """

    init: AggregateInit
    add: AggregateAdd
    result: AggregateResult
    description: str = ""

    def __repr__(self) -> str:
        return self.description or f"Aggregate({describe(self.add)})"


Measure = Metric | Aggregate | Paired
"""What an evaluation takes: means of a batch, an aggregate, or either of what the loss compares."""


def sorted_out(measures: Iterable[Measure], loss: Loss) -> tuple[tuple[Metric, ...], tuple[Aggregate, ...]]:
    """Tell means from aggregates, each of what the loss compares.

    Raises:
        ValueError: One is neither, or the loss does not tell which predictions belong to which targets.
    """
    if isinstance(measures, Aggregate | Paired) or not isinstance(measures, Iterable):
        raise ValueError(f"metrics takes a sequence: metrics=({measures!r},)")
    metrics: list[Metric] = []
    aggregates: list[Aggregate] = []
    for measure in measures:
        found = measure.as_in(loss) if isinstance(measure, Paired) else measure
        if isinstance(found, Aggregate):
            aggregates.append(found)
        elif callable(found) and not isinstance(found, type):
            metrics.append(found)
        else:
            raise ValueError(
                f"metrics: {measure!r} is neither a function (outputs, batch) -> {{name: Mean}} nor an Aggregate; "
                "such are ff.metrics.accuracy, ff.metrics.top_k(5), ff.metrics.f1(classes=10)"
            )
    return tuple(metrics), tuple(aggregates)
