"""Streams of batches, described in one call."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, get_args

from torch.utils.data import default_collate

from forgather_fn.data.fetch import Collate, source
from forgather_fn.data.indexed import IndexedStream
from forgather_fn.data.iterated import IteratedStream
from forgather_fn.data.mixing import Mixture
from forgather_fn.data.order import Order, Ordering
from forgather_fn.data.resumable import resumable
from forgather_fn.data.sizes import BatchSize, Sizes, sizes
from forgather_fn.data.stream import Last, Stream
from forgather_fn.describe import describe
from forgather_fn.signature import checked, shown


@checked
def batches(
    dataset: Any,
    *,
    batch_size: BatchSize,
    order: Order | Ordering = "shuffled",
    last: Last = "span",
    collate: Collate | None = None,
    epochs: int | None = None,
    workers: int = 0,
    threads: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    random: bool = False,
    seed: int | None = None,
) -> Stream:
    """Describe the batches that a job trains on, or evaluates with.

    Sample ``i`` of the job is sample ``permutation(seed, epoch)(i % n)`` of the dataset, with ``epoch = i // n``: which
    sample comes when does not depend on workers, world size, batch size or restarts, and the position is one integer.

    Args:
        dataset: Whatever has a length and can be indexed: a list, or a map-style ``torch.utils.data.Dataset`` (its
            ``__getitems__`` is used if it has one). A tensor, a numpy array, and a mapping, a tuple or a
            ``TensorDataset`` of them, all of one length, are sliced without a Python loop; arrays become tensors.
            Also what can only be iterated (an ``IterableDataset``, a function that gives an iterator), with
            ``order="sequential"``: see :class:`~forgather_fn.data.iterated.IteratedStream`.
        batch_size: Samples in a step, over all its microbatches and ranks; or a schedule of it: the sizes by the steps
            from which on they hold (``{0: 32, 1000: 64}``), or a function of the step. Steps count from the start of
            the stream, and a schedule needs ``last="span"``.
        order: ``"shuffled"``, by a permutation in constant memory (:func:`forgather_fn.data.permutation.permuted`);
            ``"torch"``, by ``torch.randperm`` under ``seed + epoch``, as transformers.Trainer does (8 bytes a sample;
            and epoch 1 of seed 0 is epoch 0 of seed 1); ``"sequential"``; or an
            :class:`~forgather_fn.data.order.Ordering`, such as :func:`~forgather_fn.data.lengths.by_length`.
        last: The last batch of an epoch is filled from the next (``"span"``), is smaller (``"ragged"``), or is left out
            (``"drop"``).
        collate: Makes a batch of a list of samples; if None, ``torch.utils.data.default_collate`` does.
        epochs: After how many the stream ends, with a smaller batch if need be. None: never.
        workers: Processes that fetch ahead. 0: samples are fetched in this process, when asked for.
        threads: Threads that fetch ahead in this process, which hides what waits for a disk or a network, or computes
            outside of Python's lock. The batches are the same. Not with ``workers``, nor with ``random``.
        prefetch: Batches that each worker or thread has in hand; without either there are none.
        pin_memory: Copy batches to page-locked memory, from which an accelerator copies asynchronously. Where there is
            no accelerator there is no such memory, and nothing is copied.
        random: Whether dataset or collate function draw from Python's, numpy's or torch's global CPU generator. Those
            are then seeded for each sample (a collate function or ``__getitems__``: for its first sample) by its epoch
            and index, and put back after each batch, which takes about 30 microseconds a sample. Without it, the first
            batch of each start is checked to draw nothing.
        seed: The data seed; if None, the job's.

    Raises:
        ValueError: A number is too small; ``order`` or ``last`` is unknown; the dataset is empty, cannot be indexed, or
            its columns differ in length; or ``last="drop"`` leaves nothing.

    Example:
        >>> import itertools, torch
        >>> stream = batches({"x": torch.arange(10)}, batch_size=4, order="sequential")
        >>> [batch.data["x"].tolist() for batch in itertools.islice(stream.start(seed=0, samples=4), 2)]
        [[4, 5, 6, 7], [8, 9, 0, 1]]
    """
    _check_dataset(dataset)
    if not (isinstance(batch_size, Mapping) or callable(batch_size)):
        _check_integers(1, batch_size=batch_size)
    _check_integers(1, prefetch=prefetch, epochs=1 if epochs is None else epochs)
    _check_integers(0, workers=workers, threads=threads)
    _check_order(order)
    if workers and threads:
        raise ValueError(
            f"workers={workers} and threads={threads}: fetch ahead in processes or in threads, not in both"
        )
    if threads and random:
        raise ValueError(MSG_THREADS_DRAW)
    each = batch_size if isinstance(batch_size, int) else sizes(batch_size)
    common: dict[str, Any] = {"batch_size": each, "last": last, "epochs": epochs, "threads": threads, "seed": seed}
    common |= {"prefetch": prefetch, "pin_memory": pin_memory, "random": random}
    iterated = None if isinstance(dataset, Mixture) else resumable(dataset)
    if iterated is not None:
        _check_iterated(dataset, order, workers, threads)
        return IteratedStream(source=iterated, collate=collate or default_collate, **common)
    if isinstance(dataset, Mixture):
        found, order = dataset.source(collate), dataset.ordering(order)
    else:
        found = source(dataset, collate)
    length = len(found.sized)
    if length == 0:
        raise ValueError(f"the dataset (a {type(dataset).__name__}) is empty: there is no batch to make of it")
    if isinstance(each, Sizes):
        _check_whole(last)
    elif last == "drop" and each > length:
        raise ValueError(
            f"last='drop' leaves nothing of {length} samples in batches of {each}: use a batch_size of at most "
            f"{length}, or last='span', which fills a batch from the next epoch"
        )
    return IndexedStream(
        dataset=dataset, length=length, order=order, collate=collate, workers=workers, source=found, **common
    )


def _check_iterated(dataset: Any, order: Order | Ordering, workers: int, threads: int) -> None:
    kind = type(dataset).__name__
    if order != "sequential":
        raise ValueError(
            f"order={describe(order)}, but a {kind} is read one sample after the other, in its own order: say "
            "order='sequential', and shuffle in the source, or give a dataset that has __len__ and __getitem__"
        )
    if workers or threads > 1:
        raise ValueError(
            f"workers={workers}, threads={threads}: a {kind} is read one sample after the other, which one thread does "
            "ahead of the step: threads=1"
        )


def _check_whole(last: Last) -> None:
    if last != "span":
        raise ValueError(
            f"last={last!r} with a schedule of the batch size: its batches are counted from the start of the job, and "
            "an epoch that ends with another batch would move them all; use last='span'"
        )


MSG_THREADS_DRAW: Final = (
    "threads with random=True: samples draw from the global generators of this process, which the step draws from at "
    "the same time. Fetch ahead in a process: workers=1; or let the dataset draw from a generator of its "
    "own, seeded by the sample's index."
)


def _check_integers(least: int, **given: int) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, Stream):
        raise ValueError(f"this is a stream already, of batches: give its dataset; got {dataset!r}")
    if isinstance(dataset, str | bytes):
        raise ValueError(
            f"the dataset is a {type(dataset).__name__}, {shown(dataset)}: for a file, ff.data.text_lines(path) or "
            "ff.data.text_bytes(path, length=...)"
        )


def _check_order(order: object) -> None:
    known = get_args(Order)
    if isinstance(order, str) and order not in known:
        near = get_close_matches(order, known, n=len(known), cutoff=0.0)
        raise ValueError(f"order={order!r} is unknown: expected one of {', '.join(map(repr, near))}")
    if not isinstance(order, str) and not callable(getattr(order, "look_up", None)):
        raise ValueError(
            f"order={shown(order)}: expected one of {', '.join(map(repr, known))}, or an order such as "
            "ff.data.by_length gives"
        )
