"""How batches come to a process: it reads its own, or the first process reads them all and sends each its own."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Final

import attrs

from forgather_fn.alike import where, which
from forgather_fn.batch import as_batch, as_it_came, check_batches, outline, owned
from forgather_fn.data import Batch, Stream
from forgather_fn.data.batch import digest
from forgather_fn.share import Microbatches, Share
from forgather_fn.state import TrainState
from forgather_fn.world import PeerError, World, check_same, known_to_all


def opened(data: Iterable[Any] | Stream, state: TrainState, share: Share | None) -> Iterator[Any]:
    """Give the batches of a stream from where a state left it, or of any iterable from where it starts."""
    if not isinstance(data, Stream):
        check_batches(data)
        return iter(data)
    return data.start(state.seed, state.samples, share, cursor=state.cursor)


def compared(world: World, state: TrainState, batches: Iterator[Any]) -> Iterator[Any]:
    """Give batches; the first of them only when all processes have found that they read the same data.

    Otherwise a seed that was forgotten, where data are drawn, split or shuffled, would train on a mixture of several
    datasets, and a pipeline on the inputs of one with the labels of another.

    Args:
        world: The processes; one alone has nothing to compare.
        state: Where they begin.
        batches: As :func:`opened` gives them.

    Raises:
        ValueError: From the iterator: they begin at other places, or there are other data there.
    """
    return batches if world.size == 1 else _compared(world, state, batches)


def _compared(world: World, state: TrainState, batches: Iterator[Any]) -> Iterator[Any]:
    with closing(batches):
        batch = next(batches, None)
        world.begin("the first step of a stream")
        place = f"{where(state)}, {state.data or 'no stream'}"
        check_same(world.gather(f"{place}: {_told(batch)}"), _UNLIKE)
        while batch is not None:
            yield batch
            batch = next(batches, None)


def _told(batch: Any) -> str:
    if batch is None:
        return "there is no batch"
    whole = as_batch(batch)
    if whole.witness is not None:
        return which(whole)
    return f"{which(whole)}, {outline(whole.data)}, which is {digest(as_it_came(whole))[:16]}"


_UNLIKE: Final = (
    "the processes of a run must be given the same data, of which each takes its part. Seed what draws, splits or "
    "shuffles them, or read on one process for all: ff.accelerated(plan, dispatch='rank0'). They begin with:"
)


@contextlib.contextmanager
def closing(iterator: Iterator[Any]) -> Iterator[None]:
    """End a generator with the block, and tell it of an exception downstream; other iterators have nothing to end."""
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(iterator, Generator):
            with contextlib.suppress(type(error)):
                iterator.throw(error)
        raise
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def dispatched(world: World, share: Share, state: TrainState, data: Iterable[Any] | Stream) -> Iterator[Batch]:
    """Read on the first process alone, for data that only one process may read; on others ``data`` is not touched.

    Args:
        world: The processes.
        share: Which microbatches this one has.
        state: Where the data goes on.
        data: Of the first process.

    Raises:
        PeerError: On the others: the first one could not read.
    """
    from torch import distributed

    source = opened(data, state, Share(share.microbatches)) if world.main else iter(())
    sent: list[Any] = [None] * world.size
    while True:
        error: Exception | None = None
        if world.main:
            try:
                batch = as_batch(next(source))
                sent = [(_own(batch, attrs.evolve(share, rank=rank)), None) for rank in range(world.size)]
            except StopIteration:
                sent = [(None, None)] * world.size
            except Exception as raised:
                error, sent = raised, [(None, f"{type(raised).__name__}: {raised}")] * world.size
        received: list[Any] = [sent[0]]
        if world.size > 1:
            world.begin("the reading of a batch")
            with world.explained():
                distributed.scatter_object_list(received, sent, group=world.control, group_src=0)
        own, text = received[0]
        if error is not None:
            raise known_to_all(error)
        if text is not None:
            raise known_to_all(PeerError(f"rank 0 could not read a batch: {text}"))
        if own is None:
            return
        yield own


def _own(batch: Batch, share: Share) -> Batch:
    """Cut out of a whole batch what a process has of it."""
    parts = tuple(part for _, part in owned(batch, share))
    return attrs.evolve(batch, data=Microbatches(parts, share.block.start))
