"""The step as compiled graphs: :mod:`~forgather_fn.graphs`, run with the tensors of a state.

A step of one microbatch is one graph. One of several is a graph of a microbatch's gradient, run for each under its own
random key, and a graph of the update; or, unrolled, one graph again. What a graph cannot do is done here: keys are
derived, schedules read, states wrapped.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn import compilable, compiler, flat, graphs, interrupt, tree
from forgather_fn.built import Built, check_layout
from forgather_fn.data import Batch
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.graphs import FLAG, Sums
from forgather_fn.losses import leading_dimension
from forgather_fn.mean import Mean
from forgather_fn.model import surrounded
from forgather_fn.optim.base import Rates, rates_at
from forgather_fn.program import Metrics
from forgather_fn.random import key, reseed, seeded
from forgather_fn.state import Arrays, NonFiniteError, TrainState, counter, nonfinite_message
from forgather_fn.step import divided, following, inverse, known_weight

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
    graphs_of = Compiled(built)
    return Execution(graphs_of.step, graphs_of.gradients, graphs_of.advance)


@attrs.define(eq=False)
class Compiled:
    """A program whose steps are graphs, made at the first of them."""

    built: Built
    made: Graphs | None = None

    def step(self, state: TrainState, batch: Batch, wants: frozenset[str]) -> tuple[TrainState, Metrics]:
        """Take a step as one graph, or as its two halves."""
        built, plan = self.built, self.built.plan
        if plan.microbatches > 1 and not plan.unroll:
            gradients, buffers, means = self.gradients(state, batch)
            return self.advance(state, gradients, buffers, means, wants)
        arrays, parts = self._begun(state, batch)
        run = self._graphs(state, parts).whole(wants)
        rates = rates_at(plan.schedule, plan.optimizer, state.step, arrays.controls)
        state.settle()
        with seeded(key(state.seed, state.step, 0, "forward"), built.device), surrounded(built.module, built.plan.loss):
            reports, sums = run(
                _tensors(arrays),
                dict(arrays.frozen),
                parts,
                *_share(built, parts),
                *_scalars(built, state, rates),
            )
        means = {name: Mean(*pair) for name, pair in sums.items()}
        return _finished(built, state, batch.samples, {**means, **reports, **rates.metrics()})

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
        """Take the first half of a step: a graph for each microbatch."""
        built = self.built
        arrays, parts = self._begun(state, batch)
        share, taken = _share(built, parts)
        total = flat.zeros(built.summing, built.device)
        found, active, buffers = self.accumulate(state, list(enumerate(parts)), total, share, interrupt.check)
        means = functools.reduce(lambda one, other: {name: one[name] + mean for name, mean in other.items()}, found)
        weight = means["loss"].weight
        views = {name: total[name] for name in itertools.compress(built.binding.layout.index, active)}
        gradients = Gradients(built.summing, active, views, total, batch.samples, weight)
        # An update writes to the state's own scale.
        scaled = attrs.evolve(arrays, loss_scale={name: held.clone() for name, held in arrays.loss_scale.items()})
        return divided(built, scaled, gradients, weight=None if taken else weight), buffers, means

    def accumulate(
        self,
        state: TrainState,
        parts: Sequence[tuple[int, Any]],
        total: Flat,
        share: Tensor | None,
        added: Callable[[], None],
    ) -> tuple[list[dict[str, Mean]], graphs.Active, Flat]:
        """Add the gradients of microbatches to a buffer, each under the key of its number.

        Args:
            state: Whose parameters they are of.
            parts: Microbatches with their numbers in the step.
            total: What is added to.
            share: What each objective is multiplied by; None for the inverse of its own weight.
            added: Called when one has been added.

        Returns:
            The means of each; which leaves have a gradient; and the buffers as forward passes leave them.
        """
        built, arrays = self.built, state.read()
        buffers, found = arrays.buffers, list[dict[str, Mean]]()
        active = (False,) * len(built.binding.layout.leaves)
        if not parts:
            return found, active, buffers
        own = self._graphs(state, [part for _, part in parts])
        scale = [held for name, held in arrays.loss_scale.items() if name == "scale"]
        held = list(buffers.buffers)
        with seeded(key(state.seed, state.step, 0, "forward"), built.device), surrounded(built.module, built.plan.loss):
            for number, part in parts:
                reseed(key(state.seed, state.step, number, "forward"), built.device)
                has, held, sums = own.gradient(
                    list(arrays.params.buffers), dict(arrays.frozen), held, list(total.buffers), part, share, scale
                )
                active = tuple(one or other for one, other in zip(active, has, strict=True))
                found.append({name: Mean(*pair) for name, pair in sums.items()})
                added()
        return found, active, Flat(own.buffers, tuple(held))

    def advance(
        self,
        state: TrainState,
        gradients: Gradients,
        buffers: Flat | None,
        means: Mapping[str, Mean],
        wants: frozenset[str],
    ) -> tuple[TrainState, Metrics]:
        """Take the second half of a step, as one graph."""
        built, arrays = self.built, state.read()
        check_layout("this gradient", gradients.layout, built.binding.layout)
        run = self._graphs(state, []).update(wants)
        rates = rates_at(built.plan.schedule, built.plan.optimizer, state.step, arrays.controls)
        state.settle()
        reports = run(
            _tensors(arrays),
            dict(gradients.views) if gradients.flat is None else list(gradients.flat.buffers),
            gradients.active,
            [] if buffers is None else list(buffers.buffers),
            {name: graphs.pair(mean) for name, mean in means.items()},
            torch.as_tensor(gradients.weight, device=built.device),
            [] if gradients.divisor is None else [gradients.divisor],
            *_scalars(built, state, rates),
        )
        return _finished(built, state, gradients.samples, {**means, **reports, **rates.metrics()})

    def _begun(self, state: TrainState, batch: Batch) -> tuple[Arrays, list[Any]]:
        built, arrays = self.built, state.read()
        built.bound(arrays)
        parts = built.parts(batch)
        if batch.varies or batch.samples % built.plan.microbatches:
            mark_sizes(parts)
        return arrays, parts

    def _graphs(self, state: TrainState, parts: Sequence[Any]) -> Graphs:
        """Give the graphs, which are made at the first call.

        Raises:
            ValueError: The state's buffers have other shapes than those that they were made for.
        """
        arrays = state.read()
        if self.made is None:
            if parts:
                compilable.try_once(self.built, state, parts[0])
            self.made = _graphs(self.built, arrays)
        if self.built.summing is not self.built.binding.layout:
            for site, _ in self.built.binding.trainable:
                site.tensor.grad = None  # the compiler takes no parameter whose gradient has another type
        layout = arrays.buffers.layout
        if layout is not self.made.buffers and layout.leaves != self.made.buffers.leaves:
            raise ValueError(
                "the state's buffers have other shapes than those that the step was compiled for; buffers that change "
                'their shape need compile="model" or compile=False'
            )
        return self.made


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
            *scalars: Any,
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
            divisor = scale if taken else [graphs.one_over(weight).reciprocal(), *scale]
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


def mark_sizes(parts: list[Any]) -> None:
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


def _scalars(built: Built, state: TrainState, rates: Rates) -> tuple[Any, ...]:
    """Give what changes from step to step as tensors: a number would be a part of the graph."""
    device = built.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return (
        torch.full((), float(rates.learning_rate), dtype=dtype, device=device),
        {name: torch.full((), float(value), dtype=dtype, device=device) for name, value in rates.scheduled.items()},
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
