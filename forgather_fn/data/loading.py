"""Answering requests for batches: in this process or in workers, with random draws that depend on neither."""

import itertools
import random as python_random
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from forgather_fn.data.fetch import Indices, Read
from forgather_fn.random import key
from forgather_fn.turn import turn

WORKER_TIMEOUT: Final = 600.0
"""Seconds to wait for one batch of a worker before it is given up as hanging."""

MSG_DRAWN: Final = (
    "fetching a batch drew from a global random generator ({names}), but the stream was made with random=False: a "
    "resumed job, or one with more workers, would draw other numbers. If the dataset or collate function draws on "
    "purpose, say batches(..., random=True): each draw is then keyed by its sample. If not, give it a generator of its "
    "own, seeded by the sample's index."
)


@attrs.frozen(eq=False)
class Request:
    """One batch to fetch.

    Attributes:
        start: The position of its first sample in the job.
        epochs: The epoch of each sample, int64, shape (samples,).
        indices: The dataset index of each sample, int64, shape (samples,).
        seed: The data seed, under which samples draw.
        first: Whether it is the first since the stream was started.
    """

    start: int
    epochs: Indices
    indices: Indices
    seed: int
    first: bool

    def rows(self, rows: slice, *, first: bool) -> "Request":
        """Cut out a microbatch; ``first`` tells whether it is the first of this process."""
        return Request(
            self.start + rows.start, self.epochs[rows], self.indices[rows], self.seed, first=self.first and first
        )

    def reseed(self, stream: str, row: int, /) -> None:
        """Seed the global generators for one sample: a function of seed, stream, epoch and dataset index only."""
        reseed(key(self.seed, stream, int(self.epochs[row]), int(self.indices[row])))


def reseed(value: int) -> None:
    """Seed the three global generators that datasets and collate functions draw from."""
    python_random.seed(value)
    np.random.seed([value & 0xFFFFFFFF, value >> 32])
    torch.default_generator.manual_seed(value)


class Guard(Protocol):
    """Decides what becomes of the global generators while a batch is read. A plain function, so that it is pickled."""

    def __call__(self, read: Read, request: Request, /) -> Any:
        """Answer the request."""


def keyed(read: Read, request: Request, /) -> Any:
    """Read a batch that draws random numbers: reseed before each draw, and put the generators back at the end."""
    with turn():
        before = Generators.read()
        try:
            return read(request.indices, request.reseed)
        finally:
            before.restore()


def undrawn(read: Read, request: Request, /) -> Any:
    """Read a batch that draws nothing. The first one is checked: a look at every batch would cost more than most reads.

    Raises:
        ValueError: The first batch drew from a global generator.
    """
    if not request.first:
        return read(request.indices, _unseeded)
    with turn():
        before = Generators.read()
        data = read(request.indices, _unseeded)
        names = before.advanced()
        if names:
            before.restore()
            raise ValueError(MSG_DRAWN.format(names=", ".join(names)))
    return data


def _unseeded(stream: str, row: int, /) -> None:
    """Seed nothing."""


@attrs.frozen(eq=False)
class Generators:
    """The states of the three global generators that datasets and collate functions draw from."""

    python: Any
    numpy: Any
    torch: Tensor

    @classmethod
    def read(cls) -> "Generators":
        """Copy the states."""
        return cls(python_random.getstate(), np.random.get_state(), torch.default_generator.get_state())

    def restore(self) -> None:
        """Put the states back."""
        python_random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)

    def advanced(self) -> list[str]:
        """Name the generators that are no longer in these states."""
        now = Generators.read()
        same = {
            "python's random": now.python == self.python,
            "numpy.random": all(np.array_equal(one, other) for one, other in zip(now.numpy, self.numpy, strict=True)),
            "torch's CPU generator": torch.equal(now.torch, self.torch),
        }
        return [name for name, unchanged in same.items() if not unchanged]


@attrs.frozen(eq=False)
class Fetch:
    """Answers to requests, by index: the form in which torch's loader calls a dataset."""

    read: Read
    guard: Guard

    def __getitem__(self, request: Request) -> Any:
        try:
            return self.guard(self.read, request)
        except Exception as error:
            stop = request.start + len(request.indices)
            error.add_note(f"while fetching samples {request.start} to {stop - 1} of the job: {request.indices}")
            raise


Answers = Generator[tuple[Request, Any], None, None]
"""Each request with its answer."""


def in_process(fetch: Fetch, requests: Iterable[Request], *, pin_memory: bool) -> Answers:
    """Answer each request when the answer is asked for."""
    finish: Callable[[Any], Any] = pinned if pin_memory else unchanged
    for request in requests:
        yield request, finish(fetch[request])


def in_workers(
    fetch: Fetch, requests: Iterator[Request], *, workers: int, prefetch: int, pin_memory: bool, seed: int
) -> Answers:
    """Answer requests in worker processes, in order, ahead of time. Closing the generator ends the workers.

    Torch's loader is given whole requests, one a batch, so that nothing depends on which worker answers; and a
    generator, because without one it draws from the global one.

    Args:
        fetch: Goes to each worker (pickled, where processes are spawned and not forked).
        requests: Taken in this process, ``workers * prefetch`` ahead of the answers.
        workers: Processes.
        prefetch: Requests that each has in hand.
        pin_memory: Copy the answers to page-locked memory.
        seed: What the workers' own generators are seeded from.

    Raises:
        RuntimeError: A worker died, or took longer than ``WORKER_TIMEOUT`` for a batch.
        ConnectionError: A worker died after it had answered, and its answer was lost with it.
    """
    expected, asked = itertools.tee(requests)
    loader: DataLoader[Any] = DataLoader(
        fetch,  # type: ignore[arg-type]  # torch asks for its base class, and calls only __getitem__
        batch_size=None,
        sampler=asked,
        collate_fn=unchanged,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT,
        worker_init_fn=_default_signals,
        generator=torch.Generator().manual_seed(key(seed, "workers")),
    )
    answers: Any = iter(loader)
    try:
        yield from zip(expected, answers, strict=True)
    finally:
        # torch does this when the last reference goes, which the traceback of an error may hold for long.
        answers._shutdown_workers()
        for worker in answers._workers:
            if worker.is_alive():  # one that hangs: torch has sent it SIGTERM, which it does not heed
                worker.kill()
                worker.join()


def pinned(data: Any) -> Any:
    """Copy tensors to page-locked memory, by what DataLoader itself calls: one rule for both."""
    return pin_memory(data)  # type: ignore[no-untyped-call]


def unchanged(data: Any) -> Any:
    """Give what is given."""
    return data


def _default_signals(worker: int) -> None:
    """Leave signals to the parent, which ends its workers.

    A scheduler signals every process of a job; a worker that died of it would fail the parent, which is about to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
