"""The step as compiled graphs: :mod:`~forgather_fn.graphs`, run with the tensors of a state.

A step of one microbatch is one graph. One of several is a graph of a microbatch's gradient, run for each under its own
random key, and a graph of the update; or, unrolled, one graph again. What a graph cannot do is done here: keys are
derived, schedules read, states wrapped.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn import compilable, compiler, flat, graphs, interrupt, tree
from forgather_fn.batch import microbatches
from forgather_fn.built import Built, check_layout
from forgather_fn.data import Batch
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.graphs import FLAG, Sums
from forgather_fn.losses import leading_dimension
from forgather_fn.mean import Mean
from forgather_fn.plan import Metrics
from forgather_fn.random import key, reseed, seeded
from forgather_fn.schedules import rate
from forgather_fn.state import Arrays, NonFiniteError, TrainState, counter, nonfinite_message
from forgather_fn.step import following, inverse, known_weight

Whole = Callable[..., tuple[dict[str, Tensor], Sums]]


@attrs.frozen(eq=False)
class Graphs:
    """The graphs of one program, each compiled when it is first called.

    Attributes:
        buffers: The layout of the model's buffers.
        gradient: Adds a microbatch's gradient to accumulators.
        update: The update, for the metrics that are wanted.
        whole: The whole step, for the metrics that are wanted.
    """

    buffers: Layout
    gradient: Callable[..., tuple[graphs.Active, list[Tensor], Sums]]
    update: Callable[[frozenset[str]], graphs.UpdateTensors]
    whole: Callable[[frozenset[str]], Whole]


def compiled(built: Built) -> Execution:
    """Run the steps of a program as compiled graphs; see :class:`~forgather_fn.execution.Execution`."""
    plan, device, layout = built.plan, built.device, built.binding.layout
    made: list[Graphs] = []

    def begun(state: TrainState, batch: Batch) -> tuple[Arrays, list[Any], Graphs]:
        arrays = state.read()
        built.bound(arrays)
        parts = microbatches(attrs.evolve(batch, data=built.place(batch.data)), plan.microbatches)
        if batch.varies or batch.samples % plan.microbatches:
            _mark_sizes(parts)
        if not made:
            compilable.try_once(built, state, parts[0])
            made.append(_graphs(built, arrays))
        buffers = arrays.buffers.layout
        if buffers is not made[0].buffers and buffers.leaves != made[0].buffers.leaves:
            raise ValueError(
                "the state's buffers have other shapes than those that the step was compiled for; buffers that change "
                'their shape need compile="model" or compile=False'
            )
        return arrays, parts, made[0]

    def step(state: TrainState, batch: Batch, wants: frozenset[str]) -> tuple[TrainState, Metrics]:
        if plan.microbatches > 1 and not plan.unroll:
            gradients, buffers, means = gradients_of(state, batch)
            return advance(state, gradients, buffers, means, wants)
        arrays, parts, own = begun(state, batch)
        run = own.whole(wants)
        learning_rate = rate(plan.schedule, state.step)
        state.settle()
        with seeded(key(state.seed, state.step, 0, "forward"), device):
            reports, sums = run(
                _tensors(arrays),
                dict(arrays.frozen),
                parts,
                *_share(built, parts),
                *_scalars(built, state, learning_rate),
            )
        means = {name: Mean(*pair) for name, pair in sums.items()}
        return _finished(built, state, batch.samples, {**means, **reports, "learning_rate": learning_rate})

    def gradients_of(state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
        arrays, parts, own = begun(state, batch)
        share, taken = _share(built, parts)
        total = flat.zeros(layout, device)
        buffers, means = list(arrays.buffers.buffers), dict[str, Mean]()
        scale = [held.clone() for name, held in arrays.loss_scale.items() if name == "scale"]  # an update writes to it
        with seeded(key(state.seed, state.step, 0, "forward"), device):
            for i, part in enumerate(parts):
                if i:
                    interrupt.check()
                    reseed(key(state.seed, state.step, i, "forward"), device)
                active, buffers, sums = own.gradient(
                    list(arrays.params.buffers), dict(arrays.frozen), buffers, list(total.buffers), part, share, scale
                )
                found = {name: Mean(*pair) for name, pair in sums.items()}
                means = {name: means[name] + mean for name, mean in found.items()} if i else found
        weight = means["loss"].weight
        divisors = [*scale] if taken else [*scale, inverse(weight, built.dtype, device).reciprocal()]
        divisor = graphs.product(divisors)
        views = {name: total[name] for name in itertools.compress(layout.index, active)}
        gradients = Gradients(layout, active, views, total, batch.samples, weight, divisor)
        return gradients, Flat(own.buffers, tuple(buffers)), means

    def advance(
        state: TrainState,
        gradients: Gradients,
        buffers: Flat | None,
        means: Mapping[str, Mean],
        wants: frozenset[str],
    ) -> tuple[TrainState, Metrics]:
        arrays = state.read()
        check_layout("this gradient", gradients.layout, layout)
        if not made:
            made.append(_graphs(built, arrays))
        run = made[0].update(wants)
        learning_rate = rate(plan.schedule, state.step)
        state.settle()
        reports = run(
            _tensors(arrays),
            dict(gradients.views) if gradients.flat is None else list(gradients.flat.buffers),
            gradients.active,
            [] if buffers is None else list(buffers.buffers),
            {name: graphs.pair(mean) for name, mean in means.items()},
            torch.as_tensor(gradients.weight, device=device),
            [] if gradients.divisor is None else [gradients.divisor],
            *_scalars(built, state, learning_rate),
        )
        return _finished(built, state, gradients.samples, {**means, **reports, "learning_rate": learning_rate})

    return Execution(step, gradients_of, advance)


def _graphs(built: Built, arrays: Arrays) -> Graphs:
    """Make the functions that are compiled when they are first called."""
    plan, layout, like = built.plan, built.binding.layout, arrays.changing()
    compilable.check_tensors(like)
    compilable.check_hooks(built)
    places = _places(like)
    differentiate = graphs.differentiation(built, arrays.buffers.layout, compiler.opaque)
    accumulate = compiler.opaque(functools.partial(graphs.accumulate, layout))
    compiled_whole = functools.partial(compiler.whole, backend=plan.backend, device=plan.device)

    def gradient(
        params: list[Tensor],
        frozen: dict[str, Tensor],
        held: list[Tensor],
        total: list[Tensor],
        part: Any,
        share: Tensor | None,
        scale: list[Tensor],
    ) -> tuple[graphs.Active, list[Tensor], Sums]:
        found, active, fresh, sums = differentiate(params, frozen, held, part, share, scale)
        accumulate(total, found, active)
        return active, fresh, sums

    def update_of(wants: frozenset[str]) -> graphs.UpdateTensors:
        return compiled_whole(compiler.opaque(graphs.updating(built, like, wants)))

    def whole_of(wants: frozenset[str]) -> Whole:
        arranged = compiler.opaque(_arrangement(built))
        update = compiler.opaque(graphs.updating(built, like, wants))

        def step(
            tensors: list[Tensor],
            frozen: dict[str, Tensor],
            parts: list[Any],
            share: Tensor | None,
            taken: bool,
            *scalars: Tensor,
        ) -> tuple[dict[str, Tensor], Sums]:
            params, held = tensors[places["params"]], tensors[places["buffers"]]
            scale = tensors[places["loss_scale"]][:1]  # the first of the two that it is
            gradient, active, held, sums = differentiate(params, frozen, held, parts[0], share, scale)
            for part in parts[1:]:
                more, also, held, own = differentiate(params, frozen, held, part, share, scale)
                assert active == also
                gradient = [one + other for one, other in zip(gradient, more, strict=True)]
                sums = {name: (total + own[name][0], weight + own[name][1]) for name, (total, weight) in sums.items()}
            weight = sums["loss"][1]
            divisor = scale if taken else [graphs.inverse(weight).reciprocal(), *scale]
            return update(tensors, arranged(gradient, active), active, held, sums, weight, divisor, *scalars), sums

        return compiled_whole(step)

    return Graphs(
        arrays.buffers.layout, compiled_whole(gradient), functools.cache(update_of), functools.cache(whole_of)
    )


def _arrangement(built: Built) -> Callable[[list[Tensor], graphs.Active], graphs.Gradient]:
    """Say how gradients reach the update: in one buffer where calls are what takes time, else as they are."""
    layout = built.binding.layout
    if built.viewed:
        return functools.partial(graphs.concatenated, layout)
    return lambda tensors, active: dict(zip(itertools.compress(layout.index, active), tensors, strict=True))


def _tensors(arrays: Arrays) -> list[Tensor]:
    """Give the inputs of a graph; steps that are donated their state keep its arrays, and so this list."""
    known = arrays.params.kept.get("tensors")
    if known is None or known[0]() is not arrays:
        known = arrays.params.kept["tensors"] = (weakref.ref(arrays), tree.tensors(arrays.changing()))
        for tensor in known[1] if arrays.updates.is_cuda else ():
            compiler.mark_static(tensor)
    found: list[Tensor] = known[1]
    return found


def _places(like: Mapping[str, Any]) -> dict[str, slice]:
    """Say where the tensors of each branch of a tree lie among all of them."""
    places, start = {}, 0
    for name, branch in like.items():
        stop = start + len(tree.tensors(branch))
        places[name], start = slice(start, stop), stop
    return places


def _mark_sizes(parts: list[Any]) -> None:
    """Make the number of samples a symbol of the graph, so that a batch of another size needs no other graph."""
    for part in parts:
        samples = leading_dimension(part)
        for tensor in tree.tensors(part):
            if tensor.dim() and tensor.shape[0] == samples:
                compiler.mark_size(tensor)


def _share(built: Built, parts: list[Any]) -> tuple[Tensor | None, bool]:
    """Say what each microbatch's objective is multiplied by, and whether gradients are of the mean then.

    One microbatch is divided by its own weight, in the graph; several by that of all, where the loss can tell it
    beforehand; else their sum is divided at the end.
    """
    if len(parts) == 1:
        return None, True
    weight = known_weight(built.plan, parts)
    if weight is None:
        return torch.ones((), dtype=built.dtype, device=built.device), False
    return inverse(weight, built.dtype, built.device), True


def _scalars(built: Built, state: TrainState, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Give what changes from step to step as tensors: a number would be a part of the graph."""
    device = built.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return (
        torch.full((), learning_rate, dtype=dtype, device=device),
        counter(state.step, device),
        counter(state.seed, device),
    )


def _finished(built: Built, state: TrainState, samples: int, reports: dict[str, Any]) -> tuple[TrainState, Metrics]:
    """Consume the state whose tensors a graph has updated; raise, on a CPU, if they are what they were.

    Every change is gated by a flag that depends on the whole backward pass, so a graph that fails has changed nothing.
    """
    plan, arrays = built.plan, state.read()
    stopped = reports.pop(FLAG)
    if built.device.type == "cpu" and plan.on_nonfinite == "raise" and stopped.item():
        first = int(arrays.nonfinite)
        if first == state.step:
            arrays.nonfinite.fill_(-1)
        raise NonFiniteError(nonfinite_message(first))
    arrays = state.consume(f"step {state.step}")
    return following(state, arrays, samples), reports
