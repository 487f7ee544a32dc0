"""Streams of batches, described in one call."""

from typing import Any, get_args

from forgather_fn.data.fetch import Collate, source
from forgather_fn.data.order import Order
from forgather_fn.data.stream import Last, Stream


def batches(
    dataset: Any,
    *,
    batch_size: int,
    order: Order = "shuffled",
    last: Last = "span",
    collate: Collate | None = None,
    epochs: int | None = None,
    workers: int = 0,
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
        batch_size: Samples in a step, over all its microbatches and ranks.
        order: ``"shuffled"``, by a permutation in constant memory (:func:`forgather_fn.data.permutation.permuted`);
            ``"torch"``, by ``torch.randperm`` under ``seed + epoch``, as transformers.Trainer does (8 bytes a sample;
            and epoch 1 of seed 0 is epoch 0 of seed 1); or ``"sequential"``.
        last: The last batch of an epoch is filled from the next (``"span"``), is smaller (``"ragged"``), or is left out
            (``"drop"``).
        collate: Makes a batch of a list of samples; if None, ``torch.utils.data.default_collate`` does.
        epochs: After how many the stream ends, with a smaller batch if need be. None: never.
        workers: Processes that fetch ahead. 0: samples are fetched in this process, when asked for.
        prefetch: Batches that each worker has in hand; without workers there are none.
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
    _check_integers(1, batch_size=batch_size, prefetch=prefetch, epochs=1 if epochs is None else epochs)
    _check_integers(0, workers=workers)
    _check_names(get_args(Order), order=order)
    _check_names(get_args(Last), last=last)
    found = source(dataset, collate)
    length = len(found.sized)
    if length == 0:
        raise ValueError(f"the dataset (a {type(dataset).__name__}) is empty: there is no batch to make of it")
    if last == "drop" and batch_size > length:
        raise ValueError(
            f"last='drop' leaves nothing of {length} samples in batches of {batch_size}: use a batch_size of at most "
            f"{length}, or last='span', which fills a batch from the next epoch"
        )
    return Stream(
        dataset=dataset,
        length=length,
        batch_size=batch_size,
        order=order,
        last=last,
        collate=collate,
        epochs=epochs,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        random=random,
        seed=seed,
        source=found,
    )


def _check_integers(least: int, **given: int) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def _check_names(known: tuple[str, ...], **given: str) -> None:
    for name, value in given.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, known))}")
