"""The step on a pipeline: a schedule of torch runs the microbatches, sums cross the processes, each updates its own."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn import alike
from forgather_fn.batch import owned
from forgather_fn.data import Batch
from forgather_fn.data.batch import digest
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients, Spread
from forgather_fn.losses import named_means
from forgather_fn.mean import Mean
from forgather_fn.pipeline.line import Line
from forgather_fn.pipeline.machine import Machine, Signature, Wires, Work, signature
from forgather_fn.pipeline.ties import Ties
from forgather_fn.pipeline.versions import Versions
from forgather_fn.pipeline.wire import Shape, packed, unpacked
from forgather_fn.program import Metrics
from forgather_fn.random import key, reseed
from forgather_fn.share import Share
from forgather_fn.state import TrainState
from forgather_fn.step import advance, composed, divided, inverse, known_weight, passed
from forgather_fn.wanted import WANTS
from forgather_fn.wide import wide
from forgather_fn.world import STEP


@attrs.define(eq=False)
class Pipeline:
    """One process of a pipeline that trains.

    Attributes:
        machine: Its stages.
        ties: What it shares with others.
        share: Which microbatches its pipeline has.
        names: Of the loss's means, known after the first step.
        moving: Whether forward passes change the model's buffers, known after the first step.
    """

    machine: Machine
    ties: Ties
    share: Share
    names: tuple[str, ...] = ()
    moving: bool = False

    @property
    def line(self) -> Line:
        """The processes."""
        return self.machine.line


def pipelining(pipeline: Pipeline) -> Execution:
    """Run the steps of a program on a pipeline.

    Before anything is sent, the processes compare what they were given. The gradient is of the mean as it arises, or a
    sum that is divided at the end, as on one device; its norm is that over all stages.
    """
    built = pipeline.machine.built

    def apply(
        state: TrainState,
        gradients: Gradients,
        buffers: Flat | None,
        means: Mapping[str, Mean],
        wants: frozenset[str],
    ) -> tuple[TrainState, Metrics]:
        advanced, metrics = advance(built, state, gradients, buffers, means, wants)
        return advanced, _everywhere(pipeline, metrics) if wants else metrics

    execution = composed(built, functools.partial(take_gradients, pipeline), apply)
    return attrs.evolve(execution, spread=over(pipeline.line, pipeline.ties.foreign))


def take_gradients(pipeline: Pipeline, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
    """Run a step's microbatches through the stages; see :class:`~forgather_fn.execution.RunPasses`."""
    machine, line, arrays = pipeline.machine, pipeline.line, state.read()
    built = machine.built
    line.world.begin(STEP)
    built.bound(arrays)
    numbers, microbatches, forms = _given(pipeline, state, batch)
    weight = known_weight(built.plan, microbatches) if line.pipelines == 1 else None
    with line.world.telling():
        if not machine.knows(forms):
            passed(
                built, state, lambda: machine.shapes(microbatches, forms)
            )  # which leaves the model's buffers as they are
        shapes = machine.shapes(microbatches, forms)
        wires = _wires(line, shapes, built.dtype)
        run = machine.schedule(wires, len(pipeline.share.block))
        moving = built.binding.buffer_slots and (pipeline.moving or not pipeline.names)
        versions = Versions(machine, arrays.buffers) if moving else None
        passes = _Passes(pipeline, state, numbers, microbatches, shapes, wires, weight, versions=versions)
        _, buffers = passed(built, state, lambda: passes.through(run))
        gradients = built.workspace.collect(batch.samples, 0.0)
        try:
            _learn(pipeline, passes.means, moving=not pipeline.names and not _same(arrays.buffers, buffers))
            gradients, means = _added(pipeline, gradients, passes.means)
            if pipeline.moving:
                line.taken_from_first(buffers.buffers)
        except BaseException:
            built.workspace.clear()
            raise
    taken = line.pipelines == 1 and (weight is not None or len(microbatches) == 1)
    return divided(built, arrays, gradients, weight=None if taken else gradients.weight), buffers, means


def _given(pipeline: Pipeline, state: TrainState, batch: Batch) -> tuple[list[int], list[Any], list[Signature]]:
    """Give the microbatches of this pipeline, with their numbers and forms, when all its processes have the same.

    Their place in the run, and some of their content, is compared at each step, and all of it at the first.

    Raises:
        ValueError: They have not, or one of them could not cut the batch.
    """
    machine, line = pipeline.machine, pipeline.line

    def read() -> tuple[tuple[list[int], list[Any], list[Signature]], Any]:
        pairs = owned(batch, pipeline.share)
        if not pairs:
            raise ValueError(f"a batch of {batch.samples} samples has no microbatch for each of {line.pipelines} lines")
        numbers = [number for number, _ in pairs]
        microbatches = [machine.built.place(microbatch) for _, microbatch in pairs]
        forms = [signature(microbatch) for microbatch in microbatches]
        # All of the content once, since it looks at every number: data that were drawn without a common seed.
        content = digest(microbatches)[:16] if not pipeline.names else ""
        return (numbers, microbatches, forms), (forms, content)

    own = functools.partial(alike.numbers, state, batch)
    (numbers, microbatches, forms), _ = line.alike(lambda: alike.told_of(state, batch), read, own)
    if machine.flow is None:
        line.world.each(lambda: machine.prove(microbatches[0]))
    return numbers, microbatches, forms


def _wires(
    line: Line, shapes: Sequence[Mapping[int, tuple[Shape | None, Shape | None]]], dtype: torch.dtype
) -> dict[int, Wires]:
    """Find the length of each wire: that of the largest hidden state of the step."""
    scalar = Shape((1,), dtype), Shape((), dtype)
    found = {}
    for stage in line.own:
        taken = max((one[stage][0] or scalar[0] for one in shapes), key=lambda shape: shape.elements)
        given = max((one[stage][1] or scalar[1] for one in shapes), key=lambda shape: shape.elements)
        found[stage] = Wires(taken.elements, _name(taken.dtype), given.elements, _name(given.dtype))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@attrs.define(eq=False)
class _Passes:
    """What the stages of this process do in one step."""

    pipeline: Pipeline
    state: TrainState
    numbers: Sequence[int]
    microbatches: Sequence[Any]
    shapes: Sequence[Mapping[int, tuple[Shape | None, Shape | None]]]
    wires: Mapping[int, Wires]
    weight: Tensor | float | None
    means: list[dict[str, Mean]] = attrs.field(factory=list)
    versions: Versions | None = None

    def through(self, run: Callable[[Work], None]) -> None:
        """Run all stages on all microbatches."""
        run(self.work)
        if self.versions is not None:
            self.versions.settle()

    def work(self, stage: int, index: int, wire: Tensor | None) -> Tensor:
        """Run one stage on one microbatch; see :data:`~forgather_fn.pipeline.machine.Work`.

        At the end of an epoch there may be fewer microbatches than the schedule has places: the first is then run
        again in the others, and counts for nothing.
        """
        machine = self.pipeline.machine
        counts = index < len(self.microbatches)
        at = index if counts else 0
        number = self.numbers[at]
        path = ("forward", stage) if stage else ("forward",)  # the first stage draws what a single device would
        reseed(key(self.state.seed, self.state.step, number, *path), machine.built.device)
        taken, given = self.shapes[at][stage]
        hidden = None if wire is None or taken is None else unpacked(wire, taken)
        with self.versions.of(stage, counts) if self.versions is not None else contextlib.nullcontext():
            result = machine.run(stage, self.microbatches[at], hidden)
        if stage == machine.line.stages - 1:
            return self._loss(result, self.microbatches[at], counts)
        if given is None or (tuple(result.shape), result.dtype) != (given.sizes, given.dtype):
            raise ValueError(
                f"stage {stage} gave a hidden state of {tuple(result.shape)} {result.dtype}, and one of "
                f"{given and given.sizes} {given and given.dtype} for another batch of this form: the form of a hidden "
                "state must follow from that of the batch"
            )
        length = self.wires[stage].given
        return packed(result if result.requires_grad else result.detach().requires_grad_(), length)

    def _loss(self, outputs: Any, microbatch: Any, counts: bool) -> Tensor:
        built = self.pipeline.machine.built
        with built.autocast():
            means = named_means(built.plan.loss(outputs, microbatch))
        total, weight = means["loss"].total, self.weight
        if not total.requires_grad:
            raise ValueError("the objective's total does not depend on any trainable parameter of the last stage")
        scale = self.state.read().loss_scale.get("scale")
        if scale is not None:
            total = wide(total)
        if len(self.microbatches) == 1 and self.pipeline.line.pipelines == 1:
            weight = means["loss"].weight
        if counts:
            self.means.append({name: mean.detach() for name, mean in means.items()})
            share = torch.ones((), dtype=total.dtype) if weight is None else inverse(weight, total.dtype, built.device)
        else:
            share = torch.zeros((), dtype=total.dtype)
        return total * share.to(total.device) * (1.0 if scale is None else scale.to(total.dtype))


def _added(
    pipeline: Pipeline, gradients: Gradients, found: Sequence[Mapping[str, Mean]]
) -> tuple[Gradients, dict[str, Mean]]:
    """Add up over processes: gradients of what several have, the means of the loss, and which parameters have one."""
    line, ties, device = pipeline.line, pipeline.ties, pipeline.machine.built.device
    flat = gradients.flat
    assert flat is not None
    ties.add(line, flat)
    index = gradients.layout.index
    tied = [float(name in index and gradients.active[index[name]]) for name in ties.names]
    pairs = [torch.zeros(2 * len(pipeline.names), dtype=_WIDE, device=device)]
    for means in found:
        told = [number for name in pipeline.names for number in (means[name].total, means[name].weight)]
        pairs.append(torch.stack([torch.as_tensor(number, dtype=_WIDE, device=device) for number in told]))
    totals = functools.reduce(torch.add, pairs[1:] or pairs)
    numbers = torch.cat([totals, torch.tensor(tied, dtype=_WIDE, device=device)])
    line.summed(numbers, line.world.group)
    active = list(gradients.active)
    for name, count in zip(ties.names, numbers[2 * len(pipeline.names) :].tolist(), strict=True):
        if name in index:
            active[index[name]] = count > 0
    if line.copies is not None:
        for buffer in flat.buffers:
            line.summed(buffer, line.copies)
        here = line.summed(torch.tensor(active, dtype=_WIDE, device=device), line.copies)
        active = [count > 0 for count in here.tolist()]
    means = {name: Mean(numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(pipeline.names)}
    gradients = gradients.having(tuple(active))
    return attrs.evolve(gradients, weight=means["loss"].weight, spread=over(line, ties.foreign)), means


_WIDE = torch.float64


def _same(before: Flat, after: Flat) -> bool:
    return before.layout is after.layout and all(map(torch.equal, before.buffers, after.buffers))


def _learn(pipeline: Pipeline, found: Sequence[Mapping[str, Mean]], moving: bool) -> None:
    """Tell all processes, after the first step, which means the loss has, and whether buffers change.

    Raises:
        ValueError: It names other means for some microbatches than for others.
    """
    kinds = {tuple(sorted(means)) for means in found}
    if not pipeline.names:
        told = pipeline.line.world.gather((kinds, moving))
        kinds = {kind for names, _ in told for kind in names}
        pipeline.names, pipeline.moving = min(kinds), any(moved for _, moved in told)
    if kinds - {pipeline.names}:
        raise ValueError(f"the loss names other means for some microbatches than for others: {sorted(kinds)}")


def over(line: Line, foreign: frozenset[str]) -> Spread:
    """Say how a gradient is spread over the stages of a line; another process counts those that are foreign."""
    return Spread(lambda numbers: line.summed(numbers, line.group), shards=False, foreign=foreign)


def _everywhere(pipeline: Pipeline, metrics: Metrics) -> Metrics:
    """Give every process the norms of the parameters of all."""
    line = pipeline.line
    prefixes = tuple(WANTS.values())
    own = {name: float(value) for name, value in metrics.items() if name.startswith(prefixes)}
    told: dict[str, float] = {}
    for found in line.world.gather(own):
        told |= found
    dtype = pipeline.machine.built.dtype
    return {**metrics, **{name: torch.tensor(told[name], dtype=dtype) for name in sorted(told)}}
