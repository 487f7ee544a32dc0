"""The step on replicas: each process runs some of the microbatches, the sums are added up, and all update alike."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from forgather_fn import alike, parcel
from forgather_fn.agreement import Agreement
from forgather_fn.batch import owned
from forgather_fn.built import Built
from forgather_fn.data import Batch
from forgather_fn.execution import Advance, Execution
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.mean import Mean
from forgather_fn.overlap import Bucket, Sending, buckets, sending
from forgather_fn.parcel import Parcel
from forgather_fn.random import key, reseed
from forgather_fn.reduction import Counter, Reduce
from forgather_fn.share import Share
from forgather_fn.state import TrainState
from forgather_fn.step import advance, backward, composed, divided, passed
from forgather_fn.world import STEP, World


class RunMicrobatches(Protocol):
    """Run forward and backward over this process's microbatches; leave the state as it is, also on failure."""

    def __call__(
        self, replica: "Replica", state: TrainState, microbatches: Sequence[tuple[int, Any]], samples: int, /
    ) -> tuple[list[dict[str, Mean]], Gradients, Flat]:
        """Give the means of each, the sum of their gradients in flat buffers, and the buffers as they leave them."""
        ...


@attrs.define(eq=False)
class Replica:
    """One of the processes that train the same model.

    Attributes:
        built: The model on this process; its gradients lie in flat buffers.
        world: The processes.
        share: Which microbatches are this one's.
        reduce: Adds tensors up over processes.
        in_pairs: Whether microbatches are added in aligned pairs too, or one after the other.
        run: Runs them.
        cuts: In which buckets the gradient is sent during the last backward pass; none where it is sent after it.
        agreed: What is known after the first step.
    """

    built: Built
    world: World
    share: Share
    reduce: Reduce
    in_pairs: bool
    run: RunMicrobatches
    cuts: tuple[Bucket, ...] = ()
    agreed: Agreement = attrs.field(factory=Agreement)

    def learn(self, found: Sequence[Mapping[str, Mean]], before: Flat, after: Flat) -> None:
        """Agree on what the steps of all processes have in common, and make room for what is sent with a gradient."""
        if self.agreed.reach(self.world, found, before, after) and self.world.size > 1:
            flags, numbers = len(self.built.binding.layout.leaves), 2 * len(self.agreed.names) + alike.NUMBERS
            self.built.workspace.reserve(parcel.size(flags, numbers, self.world.size))

    def sending(self) -> contextlib.AbstractContextManager[Sending]:
        """Send the gradient while the backward pass in a block makes it."""
        where = {name: i for i, name in enumerate(self.built.binding.layout.index)}
        parameters = {site.tensor: where[name] for site, name in self.built.binding.trainable}
        flat = self.built.workspace.collect(0, 0.0).flat
        assert flat is not None
        return sending(self.world, flat, self.cuts, parameters)

    def add(self, flat: Flat, active: Sequence[bool], numbers: Tensor) -> Parcel:
        """Add up the gradient of all processes in place, and with it what else is to be known, in one transfer."""
        if self.world.size == 1:
            return Parcel(torch.tensor(active), numbers[None])
        first, *others = flat.buffers
        if self.cuts:  # the gradient has arrived
            alone = parcel.packed(active, numbers, self.world, first.dtype)
            self.reduce([alone])
            return parcel.opened(alone, len(active), self.world)
        whole = parcel.behind(first, parcel.packed(active, numbers, self.world, first.dtype))
        self.reduce([whole, *others])
        if whole.data_ptr() != first.data_ptr():
            first.copy_(whole[: len(first)])
        return parcel.opened(whole[len(first) :], len(active), self.world)


def replicated(
    built: Built, world: World, share: Share, reduce: Reduce, in_pairs: bool, overlap_bytes: int
) -> Execution:
    """Run the steps of a program on replicas.

    Nothing is sent before the last backward pass of this process has ended, so a step that fails before may be tried
    again. Then gradients are added up, and with them, in the same transfer, what else is to be known: the means of the
    loss, and which parameters have a gradient. Gradients are sums until then, and divided once, by the weight of the
    whole step. Large gradients are sent in pieces during the last backward pass; see :mod:`~forgather_fn.overlap`.

    Args:
        built: The model; its gradients lie in flat buffers.
        world: The processes.
        share: Which microbatches are this one's.
        reduce: Adds tensors up over processes.
        in_pairs: Whether microbatches are added in aligned pairs too.
        overlap_bytes: From which size of the gradient on it is sent in pieces.
    """
    run, second = _halves(built)
    layout = built.binding.layout
    overlapped = world.size > 1 and not in_pairs and layout.bytes >= overlap_bytes and built.plan.compile is not True
    replica = Replica(built, world, share, reduce, in_pairs, run, buckets(layout) if overlapped else ())

    return composed(built, functools.partial(take_gradients, replica), second)


def _halves(built: Built) -> tuple[RunMicrobatches, Advance]:
    if built.plan.compile is not True:
        return run_eagerly, functools.partial(advance, built)
    from forgather_fn.replicated_graphs import graph_halves  # when used: the compiler is as large as the rest of torch

    return graph_halves(built)


def take_gradients(replica: Replica, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
    """Run forward and backward over this process's microbatches, and add up over all; see :class:`Execution`."""
    built, arrays = replica.built, state.read()
    built.bound(arrays)
    microbatches = [(number, built.place(microbatch)) for number, microbatch in owned(batch, replica.share)]
    several = replica.world.size > 1
    own = alike.numbers(state, batch, built.device) if several else None  # before anything is begun, since it may fail
    found, gradients, buffers = replica.run(replica, state, microbatches, batch.samples)
    assert gradients.flat is not None
    try:
        if not replica.cuts:
            replica.world.begin(STEP)
        replica.learn(found, arrays.buffers, buffers)
        sums = replica.agreed.sums(found, built.device)
        added = replica.add(gradients.flat, gradients.active, sums if own is None else torch.cat([sums, own]))
        means = replica.agreed.means(parcel.paired(added.rows[:, : len(sums)]))
        if several:
            rows = added.rows[:, len(sums) :]
            means["loss"] = alike.checked(means["loss"], rows, replica.world, state, batch)
        replica.agreed.take_buffers(replica.world, buffers)
    except BaseException:
        built.workspace.clear()
        raise
    weight = torch.as_tensor(means["loss"].weight)
    return _read(replica, state, gradients, added.counts, weight), buffers, means


def run_eagerly(
    replica: Replica, state: TrainState, microbatches: Sequence[tuple[int, Any]], samples: int
) -> tuple[list[dict[str, Mean]], Gradients, Flat]:
    """Run microbatches as they stand; see :class:`RunMicrobatches`."""
    built = replica.built
    (found, counter), buffers = passed(built, state, lambda: _accumulate(replica, state, microbatches))
    if replica.cuts and not microbatches:  # what the others add up has a part of this process too
        with replica.sending() as going:
            going.finish()
    gradients = built.workspace.collect(samples, 0.0)
    if counter is not None:
        assert gradients.flat is not None
        counter.leave(gradients.flat.buffers)
    return found, gradients, buffers


def _accumulate(
    replica: Replica, state: TrainState, microbatches: Sequence[tuple[int, Any]]
) -> tuple[list[dict[str, Mean]], Counter | None]:
    """Run the microbatches of this process, each under the key of its number."""
    built, scale = replica.built, state.read().loss_scale.get("scale")
    counter = Counter() if replica.in_pairs and len(microbatches) != 1 else None
    found = []
    for number, microbatch in microbatches:
        reseed(key(state.seed, state.step, number, "forward"), built.device)
        means = built.forward(microbatch)
        if replica.cuts and number == microbatches[-1][0]:
            with replica.sending() as going:
                backward(built, means["loss"].total, None, scale)
            going.finish()
        else:
            backward(built, means["loss"].total, None, scale)
        found.append({name: mean.detach() for name, mean in means.items()})
        if counter is not None:
            flat = built.workspace.collect(0, 0.0).flat
            assert flat is not None
            counter.take(flat.buffers)
    return found, counter


def _read(replica: Replica, state: TrainState, gradients: Gradients, counts: Tensor, weight: Tensor) -> Gradients:
    """Make the gradient of the mean over all processes; a parameter has one if it has on any of them."""
    if not all(gradients.active):  # otherwise there is nothing to look for, and on an accelerator nothing to wait for
        gradients = gradients.having(tuple(count > 0 for count in counts.tolist()))
    gradients = attrs.evolve(gradients, weight=weight)
    return divided(replica.built, state.read(), gradients, weight=weight)
