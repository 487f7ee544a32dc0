"""The step on shards: each process runs some of the microbatches, and has a block of rows of everything else.

Parameters, gradients, slots and averages are cut among the processes; a unit of the model is whole only while it
computes. What is added up over processes arrives as each process's own rows.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn import alike, parcel
from forgather_fn import flat as flat_storage
from forgather_fn.agreement import Agreement
from forgather_fn.batch import owned
from forgather_fn.built import Built
from forgather_fn.data import Batch
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat, Layout
from forgather_fn.fsdp import Fsdp
from forgather_fn.gradient import Gradients, Spread, Summed, squares
from forgather_fn.mean import Mean
from forgather_fn.random import key, reseed
from forgather_fn.share import Microbatches, Share
from forgather_fn.state import TrainState
from forgather_fn.step import advance, backward, composed, divided, passed
from forgather_fn.workspace import Workspace
from forgather_fn.world import STEP, World


@attrs.frozen(eq=False)
class Holder:
    """One of the processes that have a model in shards.

    Attributes:
        built: The model on this process.
        fsdp: Its shards.
        world: The processes.
        share: Which microbatches are this one's.
        agreed: What is known after the first step.
    """

    built: Built
    fsdp: Fsdp
    world: World
    share: Share
    agreed: Agreement = attrs.field(factory=Agreement)


def on_shards(built: Built, fsdp: Fsdp, world: World, share: Share) -> Execution:
    """Run the steps of a program on shards.

    Each unit is gathered before its passes, and its gradient added up after its backward pass, once a microbatch: so
    no process ever holds a whole gradient. Gradients are sums until all are there, and divided once, by the weight of
    the whole step. Then one small transfer tells every process what it cannot know from its rows: the means of the
    loss, the norm of the whole gradient, and which parameters have one.

    A process that fails in a pass leaves the others waiting for it, until they are told (see ``World.watch``).

    Args:
        built: The model; its gradients are collected by :func:`shard_workspace`.
        fsdp: Its shards.
        world: The processes.
        share: Which microbatches are this one's.
    """
    take = functools.partial(take_gradients, Holder(built, fsdp, world, share))
    execution = composed(built, take, functools.partial(advance, built))
    return attrs.evolve(execution, spread=Spread(added(world), shards=True))


def shard_workspace(layout: Layout, fsdp: Fsdp, device: torch.device, summed: Summed) -> Workspace:
    """Have backward passes add this process's rows of the gradient to flat storage.

    Args:
        layout: Of the shards.
        fsdp: The module that they are of.
        device: Where it is.
        summed: Adds numbers up over the processes.
    """
    flat: Flat
    named: dict[str, Tensor]
    spread = Spread(summed, shards=True)

    def renew() -> None:
        nonlocal flat, named
        flat = flat_storage.zeros(layout, device)
        named = {leaf.name: flat.alias(leaf.name) for leaf in layout.leaves}
        fsdp.collect_in(flat)

    def clear() -> None:
        for buffer in flat.buffers:
            buffer.zero_()
        fsdp.begin()

    def collect(samples: int, weight: Tensor | float, /) -> Gradients:
        active = tuple([name in fsdp.used for name in named])
        present = named if all(active) else {name: named[name] for name in itertools.compress(named, active)}
        return Gradients(layout, active, present, flat, samples, weight, spread=spread)

    renew()
    return Workspace(layout, clear, collect, renew, release=lambda: None, reserve=lambda elements: None)


def take_gradients(holder: Holder, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
    """Run forward and backward over this process's microbatches, in step with the others; see :class:`Execution`."""
    built, arrays, world = holder.built, state.read(), holder.world
    own = alike.numbers(state, batch)  # before anything is begun, since it may fail
    world.begin(STEP)
    alike.compare(world, own, state, batch)  # before any transfer: how many there are depends on the batch
    built.bound(arrays)
    microbatches = [(number, built.place(data)) for number, data in in_step(batch, holder.share, world)]
    try:
        with world.explained():
            found, buffers = passed(built, state, lambda: _accumulate(built, state, microbatches))
        gradients = built.workspace.collect(batch.samples, 0.0)
        holder.agreed.reach(world, found, arrays.buffers, buffers)
        counts, square, numbers = _told(holder, gradients, found)
        holder.agreed.take_buffers(world, buffers)
    except BaseException:
        holder.fsdp.recover()
        built.workspace.clear()
        raise
    means = holder.agreed.means(numbers)
    gradients = _read(gradients, counts, square, means["loss"].weight)
    return divided(built, arrays, gradients, weight=gradients.weight), buffers, means


def in_step(batch: Batch, share: Share, world: World) -> list[tuple[int | None, Any]]:
    """Give a process's microbatches with their numbers, and as many as the fullest process has.

    Every process takes part in every transfer, so that one with fewer (where an epoch ends) runs the first microbatch
    of the step in their place, numbered None, for nothing.
    """
    data = batch.data
    own: list[tuple[int | None, Any]] = [*owned(batch, share)]
    cut_already = isinstance(data, Microbatches)
    filled = min(share.microbatches, batch.samples)
    if cut_already and not data.first and len(data.items) < filled and len(data.items) != len(share.block):
        filled = len(data.items)  # whole on every process, and with fewer of them than there may be
    rounds = min(filled, len(share.block))
    if cut_already and batch.samples < share.microbatches:
        spare = world.broadcast(own[0][1] if world.main else None)
    elif len(own) < rounds:
        spare = owned(batch, attrs.evolve(share, rank=0))[0][1]
    else:
        return own
    return own + [(None, spare)] * (rounds - len(own))


def _accumulate(
    built: Built, state: TrainState, microbatches: Sequence[tuple[int | None, Any]]
) -> list[dict[str, Mean]]:
    """Run microbatches, each under the key of its number; one that has none, a copy of the first, weighs nothing."""
    scale = state.read().loss_scale.get("scale")
    found = []
    for number, data in microbatches:
        reseed(key(state.seed, state.step, number or 0, "forward"), built.device)
        means = built.forward(data)
        backward(built, means["loss"].total, 0.0 if number is None else None, scale)
        if number is not None:
            found.append({name: mean.detach() for name, mean in means.items()})
    return found


def _told(holder: Holder, gradients: Gradients, found: Sequence[Mapping[str, Mean]]) -> tuple[Tensor, Tensor, Tensor]:
    """Add up over processes: how many have reached each parameter, the square of the norm, totals and weights."""
    device = holder.built.device
    flags = parcel.flagged(gradients.active, torch.float64, device)
    order = float(holder.fsdp.order)
    others = torch.tensor([order, order * order], dtype=torch.float64, device=device)
    square = squares(gradients.whole()).sum().reshape(1)
    numbers = added(holder.world)(torch.cat([flags, square, others, holder.agreed.sums(found, device)]))
    counts, square, orders, means = torch.split(numbers, [len(flags), 1, 2, len(numbers) - len(flags) - 3])
    return counts, _if_alike(orders, square[0], holder.world), means


def _if_alike(orders: Tensor, square: Tensor, world: World) -> Tensor:
    """Give the square of the norm if what was gathered was the same unit everywhere: if the orders' variance is 0.

    On an accelerator nobody waits for the answer: it is nan otherwise, which stops the run as any that is not finite.

    Raises:
        ValueError: It was not, on a CPU.
    """
    alike = orders[0].square() == world.size * orders[1]
    if square.device.type != "cpu":
        return torch.where(alike, square, torch.nan)
    if not alike:
        raise ValueError(
            "sharded: the units of the model ran in another order on some processes than on others, so that parts of "
            "different units were put together. Nothing was updated. Where it depends on the data which of them run, "
            "let a module around them be the unit: accelerated(plan, sharded=[...])"
        )
    return square


def added(world: World) -> Summed:
    """Make the sum of a few numbers over processes: the same bits on each of them."""

    def add(numbers: Tensor, /) -> Tensor:
        from torch import distributed

        flat = numbers.reshape(-1)
        rows = flat.new_empty(world.size, len(flat))
        with world.explained():
            distributed.all_gather_single(rows.view(-1), flat, group=world.group)
        return parcel.paired(rows).view(numbers.shape)

    return add


def _read(gradients: Gradients, counts: Tensor, square: Tensor, weight: Tensor | float) -> Gradients:
    """Make the gradient of all processes; a parameter has one if it has on any of them."""
    if not all(gradients.active):  # otherwise there is nothing to look for, and on an accelerator nothing to wait for
        gradients = gradients.having(tuple(count > 0 for count in counts.tolist()))
    widest = max(gradients.layout.dtypes, key=lambda dtype: dtype.itemsize)
    norm = square.sqrt().to(widest if widest.itemsize > 4 else torch.float32)
    return attrs.evolve(gradients, weight=weight, known_norm=norm)
