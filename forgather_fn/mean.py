"""Means that are added, never averaged."""

import dataclasses
from collections.abc import Iterable

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False, slots=True)  # which torch.compile can build in a graph; attrs it cannot
class Mean:
    """A sum and its weight: the one way in which losses and metrics are combined.

    Means of parts (microbatches, ranks, pipeline stages, evaluation batches) are *added*, and divided once, at the end,
    so that ragged parts count by their weight. The mean of means is a bug that looks like a result.

    Attributes:
        total: The weighted sum, a scalar tensor; differentiable where it is an objective.
        weight: What it is a sum over (tokens, samples), a scalar tensor or a number.

    Example:
        >>> import torch
        >>> float(Mean(torch.tensor(6.0), 2) + Mean(torch.tensor(1.0), 5))
        1.0
        >>> mean = Mean(torch.tensor(2.0), 3)
        >>> f"{mean:.3f}", mean.item()
        ('0.667', 0.6666666865348816)
    """

    total: Tensor
    weight: Tensor | float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def detach(self) -> "Mean":
        """Leave the graph, in float64 where the device has it, so that long sums stay exact."""
        total = self.total.detach()
        if total.device.type != "mps":
            total = total.double()
        return Mean(total, self.weight.detach() if isinstance(self.weight, Tensor) else self.weight)

    def value(self) -> Tensor:
        """Divide. A mean over nothing is nan."""
        return self.total / self.weight

    def __float__(self) -> float:
        """Divide on the host. This waits for the device."""
        return float(self.value())

    def __format__(self, spec: str) -> str:
        """Write the quotient, as ``f"{mean:.3f}"`` asks for it; without a format, sum and weight as ``repr`` does."""
        return format(float(self), spec) if spec else repr(self)

    def item(self) -> float:
        """Divide on the host, as ``float`` does: what a loss that is a tensor has under this name."""
        return float(self)


def summed(means: Iterable[Mean]) -> Mean:
    """Add means, in the order given.

    Raises:
        ValueError: There are none.
    """
    iterator = iter(means)
    try:
        result = next(iterator)
    except StopIteration:
        raise ValueError("there are no means to add: the data gave no batch") from None
    for mean in iterator:
        result = result + mean
    return result


def of(values: Tensor) -> Mean:
    """Take the mean over all elements of a tensor, of any shape.

    Example:
        >>> import torch
        >>> float(of(torch.tensor([1.0, 3.0])))
        2.0
    """
    return Mean(values.sum(), values.numel())
