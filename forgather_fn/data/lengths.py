"""Batches of samples of similar length, so that little is padded."""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from forgather_fn.data.fetch import Indices
from forgather_fn.data.permutation import permuted
from forgather_fn.random import key
from forgather_fn.signature import checked, shown

MOST: Final = 2**48
"""The largest length: sums of them are integers of 64 bits too."""


@attrs.frozen(repr=False)
class ByLength:
    """An order that puts samples of similar length together; made by :func:`by_length`."""

    group: int
    groups: int
    digest: str
    _lengths: Indices = attrs.field(eq=False)

    def look_up(self, start: int, stop: int, /, *, n: int, epoch_length: int, seed: int) -> tuple[Indices, Indices]:
        """Find the samples at positions, window by window."""
        if n != len(self._lengths):
            raise ValueError(f"by_length was given {len(self._lengths)} lengths, but the dataset has {n} samples")
        if not 0 <= start <= stop:
            raise ValueError(f"positions from {start} to {stop}: expected 0 <= start <= stop")
        epochs, offsets = np.divmod(np.arange(start, stop, dtype=np.int64), np.int64(epoch_length))
        indices = np.empty_like(offsets)
        windows = offsets // (self.group * self.groups)
        for epoch in np.unique(epochs).tolist():
            for window in np.unique(windows[epochs == epoch]).tolist():
                rows = (epochs == epoch) & (windows == window)
                first = window * self.group * self.groups
                indices[rows] = self._window(first, n, epoch_length, seed, epoch)[offsets[rows] - first]
        return epochs, indices

    def epoch_ranges(self, n: int, /) -> list[range]:
        """All samples have one epoch."""
        return [range(n)]

    def _window(self, first: int, n: int, epoch_length: int, seed: int, epoch: int) -> Indices:
        """Draw the samples of a window, sort them, and shuffle the groups; one that is not full stays the last."""
        offsets = np.arange(first, min(first + self.group * self.groups, epoch_length))
        drawn = permuted(offsets, n=n, key=key(seed, "data", epoch))
        ordered = drawn[np.argsort(-self._lengths[drawn], kind="stable")]
        full = len(ordered) // self.group
        if not full:
            return ordered
        whole = ordered[: full * self.group].reshape(full, self.group)
        places = permuted(np.arange(full), n=full, key=key(seed, "groups", epoch, first))
        return np.concatenate([whole[places].reshape(-1), ordered[full * self.group :]])

    def __repr__(self) -> str:
        return f"by_length(group={self.group}, groups={self.groups}, lengths={self.digest})"


def lengths_of(given: Any, what: str) -> Indices:
    """Read a length for each sample.

    Raises:
        ValueError: They are no integers of at least 0, or not in one dimension.
    """
    try:
        known = np.asarray(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        known = np.empty((), object)  # what cannot be an array is of no type that is taken
    if known.ndim != 1 or (known.size and (known.dtype.kind not in "iu" or int(known.min()) < 0)):
        raise ValueError(f"{what}: lengths must be integers of at least 0, one for each sample; got {shown(given)}")
    if known.size and int(known.max()) > MOST:
        raise ValueError(f"{what}: a length of {known.max()} is more than {MOST}")
    return np.ascontiguousarray(known, dtype=np.int64)


@checked
def by_length(lengths: Sequence[int] | npt.NDArray[np.integer], *, group: int, groups: int = 50) -> ByLength:
    """Order samples so that those of a batch are of similar length, at random otherwise.

    As in ``group_by_length`` of transformers: an epoch is shuffled, cut into windows of ``groups * group`` samples, and
    each window sorted by length. The groups of a window are then shuffled, so that lengths do not fall through each of
    them. Each epoch is a permutation, any position of which is found by drawing and sorting one window.

    Args:
        lengths: Of each sample, in any unit.
        group: Samples that are put together: the batch size of the whole step, for batches that begin with an epoch,
            which ``last="drop"`` and ``last="ragged"`` make.
        groups: How many are drawn together: more give more equal lengths, and less chance.

    Raises:
        ValueError: A number is less than 1, or the lengths are no integers of at least 0, in one dimension.

    Example:
        >>> from forgather_fn import batches
        >>> texts = ["a" * (1 + 7 * i % 12) for i in range(12)]
        >>> order = by_length([len(text) for text in texts], group=3)
        >>> [
        ...     [len(text) for text in batch.data]
        ...     for batch in batches(texts, batch_size=3, order=order, epochs=1, collate=list).start(seed=0, samples=0)
        ... ]
        [[12, 11, 10], [6, 5, 4], [9, 8, 7], [3, 2, 1]]
    """
    known = lengths_of(lengths, "by_length")
    if group < 1 or groups < 1:
        raise ValueError(f"by_length(group={group}, groups={groups}): both must be at least 1")
    digest = hashlib.sha256(known.tobytes()).hexdigest()[:16]
    return ByLength(group, groups, digest, known)
