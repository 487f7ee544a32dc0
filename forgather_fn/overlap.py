"""Sums over processes that begin while the backward pass still runs.

Large gradients are sent in buckets, each as soon as the last of its parameters has its gradient. A backward pass comes
to the last layers first, so buckets are sent in the opposite order of the model's, and in the same order on every
process, whatever order gradients arrive in. Source: Li et al., "PyTorch Distributed", arXiv 2006.15704.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
from torch import Tensor, nn

from forgather_fn.flat import Flat, Layout
from forgather_fn.world import STEP, World

BUCKET_BYTES: Final = 25 * 2**20
"""About how much is sent at a time: what DistributedDataParallel sends."""

OVERLAPPED_BYTES: Final = 64 * 2**20
"""From which size of the gradient on it is sent in buckets, where transfers do not take the cores that compute: below,
a bucket would be as good as all of it."""

NEVER: Final = 1 << 62
"""On a CPU, where a backward pass and a transfer beside it slow each other down (measured:
``docs/distributed-training.md``)."""


@attrs.frozen
class Bucket:
    """A range of a flat buffer, and the numbers of the leaves that lie in it."""

    buffer: int
    start: int
    stop: int
    leaves: tuple[int, ...]


def buckets(layout: Layout) -> tuple[Bucket, ...]:
    """Cut flat buffers into ranges of about 25 MiB, and at least about four, in the order in which they are to be sent.

    That is by the first of their leaves in the model, the last first: a range that has any leaf of the first layer is
    ready last.
    """
    size = min(BUCKET_BYTES, layout.bytes // 4)
    found: list[Bucket] = []
    for number, (length, dtype) in enumerate(zip(layout.sizes, layout.dtypes, strict=True)):
        inside = sorted((leaf.offset, i) for i, leaf in enumerate(layout.leaves) if leaf.buffer == number)
        start, held = 0, list[int]()
        for (_, i), after in zip(inside, [*(offset for offset, _ in inside[1:]), length], strict=True):
            held.append(i)
            if (after - start) * dtype.itemsize >= size or after == length:
                found.append(Bucket(number, start, after, tuple(held)))
                start, held = after, []
    return tuple(sorted(found, key=lambda bucket: -min(bucket.leaves)))


@attrs.define(eq=False)
class Sending:
    """One gradient on its way; made by :func:`sending`."""

    world: World
    flat: Flat
    cuts: Sequence[Bucket]
    missing: list[int]
    works: list[Any] = attrs.field(factory=list)

    def arrived(self, cut: int) -> None:
        """Note that one more gradient of a bucket is there, and send what is complete, in order.

        Raises:
            RuntimeError: It had been sent: a parameter got its gradient in more than one piece.
        """
        self.missing[cut] -= 1
        if self.missing[cut] < 0:
            raise RuntimeError(
                "a parameter got its gradient in several pieces in one backward pass, after it was sent (reentrant "
                "activation checkpointing does that): use checkpoint(..., use_reentrant=False)"
            )
        while len(self.works) < len(self.cuts) and not self.missing[len(self.works)]:
            self.send()

    def send(self) -> None:
        """Begin to add up the next bucket."""
        from torch import distributed

        if not self.works:  # what fails before may be tried again
            self.world.begin(STEP)
        bucket = self.cuts[len(self.works)]
        part: Tensor = self.flat.buffers[bucket.buffer][bucket.start : bucket.stop]
        with self.world.explained():
            self.works.append(distributed.all_reduce(part, group=self.world.group, async_op=True))

    def finish(self) -> None:
        """Send what parameters without a gradient have held up, and wait for all."""
        while len(self.works) < len(self.cuts):
            self.send()
        with self.world.explained():
            for work in self.works:
                work.wait()


@contextlib.contextmanager
def sending(
    world: World, flat: Flat, cuts: Sequence[Bucket], parameters: Mapping[nn.Parameter, int]
) -> Iterator[Sending]:
    """Send gradients while the backward pass in the block makes them; call :meth:`Sending.finish` after it.

    Args:
        world: The processes.
        flat: Where gradients arise.
        cuts: In which ranges it is sent; see :func:`buckets`.
        parameters: All of them, with the number of the leaf that each is.
    """
    places = {leaf: number for number, cut in enumerate(cuts) for leaf in cut.leaves}
    missing = [0] * len(cuts)
    for leaf in parameters.values():
        missing[places[leaf]] += 1
    going = Sending(world, flat, cuts, missing)
    with contextlib.ExitStack() as hooks:
        for parameter, leaf in parameters.items():
            register: Callable[..., Any] = parameter.register_post_accumulate_grad_hook
            hooks.callback(register(lambda _, cut=places[leaf]: going.arrived(cut)).remove)
        try:
            yield going
        except BaseException as error:
            if going.works:
                world.fail(error)  # others have begun what cannot be taken back
            raise
