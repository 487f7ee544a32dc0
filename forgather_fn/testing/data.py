"""Law 9: an epoch is a permutation, and a stream depends on its seed alone."""

import contextlib
import itertools
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Final, cast

import attrs
import numpy as np
import torch
from torch import Tensor

from forgather_fn import tree
from forgather_fn.data import Batch, IndexedStream, IteratedStream, Stream
from forgather_fn.data.fetch import Indices
from forgather_fn.loop import Tick
from forgather_fn.plan import Plan
from forgather_fn.state import TrainState, difference
from forgather_fn.testing.compare import snapshot
from forgather_fn.testing.subject import subject
from forgather_fn.testing.surroundings import drawing_nothing, elsewhere

_BLOCK: Final = 1 << 20
"""Positions looked up at once."""

_BY_IDENTITY: Final[Any] = object.__eq__


def check_data(stream: Stream, *, plan: Plan | None = None, batches: int = 5, seed: int = 0) -> None:
    """Check that each epoch is a permutation, and that nothing but the seed decides which samples come when.

    The first two epochs are looked up in whole (eight bytes a sample); where parts of the dataset have epochs of their
    own, as the sources of a mixture, each of these is. The first batches are fetched: once more, with
    other numbers in the global random generators, another ``RANK`` in the environment and another date; with workers
    (or without, if the stream has them); started again at every batch; and at other batch sizes, unless the stream's
    fingerprint says that the batch size counts. At other batch sizes the indices of the samples are compared, and their
    values where samples do not depend on their batch through ``collate`` or ``__getitems__``.

    Args:
        stream: As :func:`~forgather_fn.data.batches` makes it.
        plan: If given, also that its program, left and started again after every step, trains on the same batches and
            arrives at the same bits. A module in it is copied.
        batches: How many batches are fetched, at most.
        seed: The job's.

    Raises:
        AssertionError: It names the position, the leaf and the sizes.
        ValueError: It is not a stream.

    Example:
        >>> import torch, forgather_fn as ff
        >>> check_data(ff.batches(torch.arange(10.0), batch_size=4))
    """
    if isinstance(stream, IteratedStream):
        raise ValueError(
            "data: the samples of this stream are read one after the other and have no number; that it is taken up "
            "where it was left is checked by check_resume(plan, stream)"
        )
    if not isinstance(stream, IndexedStream):
        raise ValueError(
            f"data: expected a stream as ff.batches(dataset, batch_size=...) makes it, got a {type(stream).__name__}"
        )
    _check_permutations(stream, seed)
    with drawing_nothing("data: fetching"):
        expected = _fetched(stream, seed, 0, batches)
    _check_indices(stream, expected, seed)
    with elsewhere():
        _compare("fetched again", expected, _fetched(stream, seed, 0, batches))
    _check_workers(stream, expected, seed)
    for number, position in enumerate(_positions(expected)):
        again = _fetched(stream, seed, position, 1)
        _compare("started again there", expected[number : number + 1], again, position)
    least = stream.least or 1
    for size in sorted({1, max(least // 2, 1), least + 1}):
        _check_size(stream, size, expected, seed)
    if plan is not None:
        _check_steps(plan, stream, expected, seed)


def _check_permutations(stream: IndexedStream, seed: int) -> None:
    """Look up two epochs, and check that no part of the dataset gives a sample twice before it has given all."""
    stop, length = 2 * stream.epoch_length, stream.length
    parts = [range(length)] if isinstance(stream.order, str) else stream.order.epoch_ranges(length)
    sizes = [stream.epoch_length] if len(parts) == 1 else [len(part) for part in parts]
    last, given = np.full(length, -1), [0] * len(parts)
    for block in range(0, stop, _BLOCK):
        epochs, indices = stream.indices(seed, block, min(block + _BLOCK, stop))
        where = f"data: with {length} samples and seed={seed}, samples {block} to {block + len(epochs) - 1} of the job"
        if indices.min() < 0 or indices.max() >= length:
            raise AssertionError(f"{where} have indices from {indices.min()} to {indices.max()}")
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            own = np.flatnonzero((indices >= part.start) & (indices < part.stop))
            expected = (given[number] + np.arange(own.size)) // size
            given[number] += own.size
            wrong = np.flatnonzero(epochs[own] != expected)
            if wrong.size:
                raise AssertionError(
                    f"{where}: sample {block + own[wrong[0]]} of the job is of epoch {expected[wrong[0]]}, "
                    f"but looked up as {epochs[own[wrong[0]]]}"
                )
            for epoch in np.unique(expected):
                values, counts = np.unique(indices[own[expected == epoch]], return_counts=True)
                twice = values[(counts > 1) | (last[values] >= epoch)]
                if twice.size:
                    raise AssertionError(
                        f"{where}: epoch {epoch} is not a permutation: it gives sample {twice[0]} more than once"
                    )
                last[values] = epoch


def _fetched(stream: IndexedStream, seed: int, position: int, count: int) -> list[Batch]:
    """Fetch some batches from a position on."""
    with contextlib.closing(stream.start(seed, position)) as batches:
        return list(itertools.islice(batches, count))


def _positions(batches: Iterable[Batch]) -> list[int]:
    """Give the position of the first sample of each batch."""
    ends = list(itertools.accumulate((batch.samples for batch in batches), initial=0))
    return ends[:-1]


def _indices(batches: Iterable[Batch]) -> Indices:
    """Join the dataset indices of all samples."""
    return np.concatenate([batch.indices for batch in batches if batch.indices is not None])


def _check_indices(stream: IndexedStream, batches: list[Batch], seed: int) -> None:
    """Compare what batches say of themselves with what the stream says of their positions."""
    for position, batch in zip(_positions(batches), batches, strict=True):
        _, expected = stream.indices(seed, position, position + batch.samples)
        found = tree.difference(torch.from_numpy(expected), torch.from_numpy(_indices([batch])), "indices")
        if found:
            raise AssertionError(
                f"data: the batch of {batch.samples} samples at sample {position} of the job has other {found}"
            )


def _compare(how: str, expected: list[Batch], found: list[Batch], start: int = 0) -> None:
    if len(expected) != len(found):
        raise AssertionError(f"data: {how}, a stream gave {len(found)} batches instead of {len(expected)}")
    for position, one, other in zip(_positions(expected), expected, found, strict=True):
        different = tree.difference(_content(one), _content(other))
        if different:
            raise AssertionError(
                f"data: {how}, the batch of {one.samples} samples at sample {start + position} of the job is another: "
                f"{different}"
            )


def _content(batch: Batch) -> dict[str, Any]:
    """Give what can be compared of a batch; objects of types without equality cannot."""
    leaves = snapshot({"samples": batch.samples, "indices": batch.indices, "data": batch.data})
    return {path: leaf for path, leaf in leaves.items() if type(leaf).__eq__ is not _BY_IDENTITY}


def _check_workers(stream: IndexedStream, expected: list[Batch], seed: int) -> None:
    """Fetch with workers, or without, if the stream has them."""
    workers = 0 if stream.workers else 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # slower on one core, but that is not asked
        found = _fetched(attrs.evolve(stream, workers=workers), seed, 0, len(expected))
    _compare(f"fetched with workers={workers}", expected, found)


def _check_size(stream: IndexedStream, size: int, expected: list[Batch], seed: int) -> None:
    """Cut the same samples into batches of another size."""
    other = attrs.evolve(stream, batch_size=size)
    if other.fingerprint(seed) != stream.fingerprint(seed):
        return  # it says itself that its batch size counts
    total = sum(batch.samples for batch in expected)
    found: list[Batch] = []
    with contextlib.closing(other.start(seed, 0)) as batches:
        while sum(batch.samples for batch in found) < total:
            found.append(next(batches))
    one, another = (torch.from_numpy(_indices(batches)[:total]) for batches in (expected, found))
    different = tree.difference(one, another, "indices")
    if not different and not stream._source.joint:
        different = tree.difference(_rows(expected), dict(itertools.islice(_rows(found).items(), total)))
    if different:
        raise AssertionError(
            f"data: in batches of {size} samples, the first {total} samples of the job are others than in batches of "
            f"{stream.batch_size}: {different}"
        )


def _rows(batches: Iterable[Batch]) -> dict[str, dict[str, Tensor]]:
    """Give the samples of batches one by one: the rows of those tensors that have one a sample."""
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        leaves = {path: leaf for path, leaf in snapshot(batch.data).items() if isinstance(leaf, Tensor)}
        columns = {path: leaf for path, leaf in leaves.items() if leaf.dim() and leaf.shape[0] == batch.samples}
        rows += [{path: leaf[row] for path, leaf in columns.items()} for row in range(batch.samples)]
    return {f"sample {position}": row for position, row in enumerate(rows)}


def _check_steps(plan: Plan, stream: IndexedStream, expected: list[Batch], seed: int) -> None:
    """Train on the stream; then start again from every state, and compare the batch and the next state."""
    made = subject(plan, seed)

    def ticks(state: TrainState, count: int) -> Iterator[Tick]:
        with contextlib.closing(cast(Generator[Tick, None, None], iter(made.program.steps(state, stream)))) as opened:
            yield from itertools.islice(opened, count)

    states = [made.first.copy(), *(tick.state.copy() for tick in ticks(made.first, len(expected)))]
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        with elsewhere():
            (tick,) = ticks(before.copy(), 1)
        start = sum(batch.samples for batch in expected[:number])
        how = f"taken up at step {number} by a state that has seen {before.samples} samples"
        _compare(how, expected[number : number + 1], [tick.batch], start)
        found = difference(after, tick.state)
        if found:
            raise AssertionError(f"data: {how}, a step of {tick.batch.samples} samples gave other bits: {found}")
