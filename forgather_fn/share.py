"""Which microbatches of a step a process has.

A step has a fixed number of microbatches, whatever the number of processes; each process has an aligned block of them.
So a microbatch has the same samples, and the same random key, on one process and on many.
"""

from typing import Any

import attrs


@attrs.frozen(eq=False)
class Microbatches:
    """The data of a batch that comes as microbatches already, each collated by itself: their shapes may differ.

    Attributes:
        items: The microbatches, or those of them that this process has; fewer than the plan's where an epoch ends.
        first: The number of the first of them among all of the step.
    """

    items: tuple[Any, ...]
    first: int = 0


@attrs.frozen
class Share:
    """A process's block of the microbatches of a step.

    Attributes:
        microbatches: How many a step has, over all processes.
        rank: Which process.
        size: How many processes; divides ``microbatches``.
    """

    microbatches: int
    rank: int = 0
    size: int = 1

    def __attrs_post_init__(self) -> None:
        """Check that every process has equally many.

        Raises:
            ValueError: They cannot be shared out evenly.
        """
        if self.microbatches % self.size:
            raise ValueError(
                f"microbatches={self.microbatches} cannot be shared out evenly among {self.size} processes; use a "
                f"multiple, such as Plan(microbatches={-(-self.microbatches // self.size) * self.size})"
            )

    @property
    def block(self) -> range:
        """The numbers of the microbatches that are this process's."""
        each = self.microbatches // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def check(self, samples: int, *, ragged: bool) -> None:
        """Make sure that a batch has a sample for each microbatch, unless an epoch ends with it.

        Raises:
            ValueError: It has not.
        """
        if samples < self.microbatches and not ragged:
            raise ValueError(
                f"microbatches={self.microbatches}, but the batch has {samples} samples: each microbatch needs at "
                "least one. Use a larger batch_size or fewer microbatches."
            )

    def rows(self, samples: int) -> list[slice]:
        """Give the rows of a batch that each microbatch of this process is; those without rows are left out.

        Example:
            >>> Share(microbatches=4, rank=1, size=2).rows(7)
            [slice(4, 6, None), slice(6, 7, None)]
        """
        return [rows for number, rows in enumerate(cut(samples, self.microbatches)) if number in self.block]


def cut(samples: int, count: int) -> list[slice]:
    """Cut a batch into near-equal parts: they differ by at most one sample, the larger ones first, none is empty.

    Example:
        >>> cut(7, 3)
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    count = min(count, samples)
    sizes = [samples // count + (i < samples % count) for i in range(count)] if count else []
    stops = [sum(sizes[: i + 1]) for i in range(count)]
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
