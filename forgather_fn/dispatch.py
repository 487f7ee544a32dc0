"""How batches come to a process: it reads its own, or the first process reads them all and sends each its own."""

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from forgather_fn.batch import as_batch, check_batches, owned
from forgather_fn.data import Batch, Stream
from forgather_fn.share import Microbatches, Share
from forgather_fn.state import TrainState
from forgather_fn.world import PeerError, World, known_to_all


def opened(data: Iterable[Any] | Stream, state: TrainState, share: Share | None) -> Iterator[Any]:
    """Give the batches of a stream from where a state left it, or of any iterable from where it starts."""
    if not isinstance(data, Stream):
        check_batches(data)
        return iter(data)
    return data.start(state.seed, state.samples, share, cursor=state.cursor)


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
