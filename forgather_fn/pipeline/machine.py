"""The stages of one process, ready to run: proved on the first batch, with a schedule for each shape of batch."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.batch import microbatches
from forgather_fn.built import Built
from forgather_fn.data import Batch
from forgather_fn.describe import describe
from forgather_fn.losses import leading_dimension
from forgather_fn.model import evaluation_mode
from forgather_fn.pipeline.cuts import Assignment, SplitError
from forgather_fn.pipeline.line import Line
from forgather_fn.pipeline.probe import Flow, probe
from forgather_fn.pipeline.schedules import quiet
from forgather_fn.pipeline.stage import Stage, cut_stage
from forgather_fn.pipeline.wire import Shape, forward_only, shape_of

KEPT: Final = 16
"""How many schedules are kept, each with the memory in which it receives."""

Signature = tuple[Any, ...]


@attrs.define(eq=False)
class Machine:
    """The stages of one process.

    Attributes:
        built: The model, with this process's parameters.
        line: The processes.
        assignment: Which stages have which tensors.
        flow: How the model runs through the stages; known after the first batch.
        stages: This process's stages, by number; known then too.
    """

    built: Built
    line: Line
    assignment: Assignment
    flow: Flow | None = None
    stages: dict[int, Stage] = attrs.field(factory=dict)
    _shapes: dict[Signature, dict[int, tuple[Shape | None, Shape | None]]] = attrs.field(factory=dict)
    _schedules: "OrderedDict[Any, Callable[[Work], None]]" = attrs.field(factory=OrderedDict)

    def prove(self, microbatch: Any) -> None:
        """Find, by the first batch, how the model runs through its stages, and that they are what was assumed.

        Raises:
            SplitError: More than a hidden state crosses a cut, or a stage uses a parameter that it was not given.
        """
        args, kwargs = self.built.arguments(first_sample(microbatch))
        self.prove_by(lambda: self.built.module(*args, **kwargs))

    def prove_by(self, call: Callable[[], Any]) -> None:
        """Do so by a call of the model; see :meth:`prove`."""
        if self.flow is not None:
            return
        model = self.built.module
        flow = probe(model, self.assignment.cuts, call)
        for name, stages in flow.assignment.params.items():
            missing = sorted(stages - self.assignment.params[name])
            if missing:
                raise SplitError(
                    f"split_spec: {name} is used in stage {missing[0]}, and lies in the modules of stage "
                    f"{min(self.assignment.params[name])}, as they are registered. Give an example batch, by which the "
                    "stages are found before parameters are shared out: pipelined(..., example=batch)"
                )
        self.flow = flow
        self.stages = {number: cut_stage(model, flow, number) for number in self.line.own}

    def keeper(self, buffer: str) -> int:
        """Tell which stage keeps a buffer: the last that uses it. What others make of it is for themselves."""
        known = {**self.assignment.buffers, **(self.flow.assignment.buffers if self.flow is not None else {})}
        return max(known.get(buffer, {0}))

    def run(self, stage: int, microbatch: Any, hidden: Tensor | None) -> Any:
        """Run one stage on a microbatch, in the precision of the plan."""
        args, kwargs = self.built.arguments(microbatch)
        with self.built.autocast():
            return self.stages[stage].run(hidden, lambda: self.built.module(*args, **kwargs))

    @property
    def reused(self) -> frozenset[int]:
        """The stages that use a parameter several times."""
        assert self.flow is not None
        return self.flow.reused

    def knows(self, signatures: Sequence[Signature]) -> bool:
        """Tell whether microbatches of these forms have been run before."""
        return all(sign in self._shapes for sign in signatures)

    def shapes(
        self, microbatches: Sequence[Any], signatures: Sequence[Signature]
    ) -> list[dict[int, tuple[Shape | None, Shape | None]]]:
        """Tell, for each microbatch, what comes into and goes out of this process's stages; collective if it is new."""
        new = {sign: number for number, sign in enumerate(signatures) if sign not in self._shapes}
        if new:
            found: dict[int, dict[int, tuple[Shape | None, Shape | None]]] = {number: {} for number in new.values()}

            def run(stage: int, number: int, hidden: Tensor | None) -> Any:
                given = self.run(stage, microbatches[number], hidden)
                ends = stage < self.line.stages - 1
                found[number][stage] = (
                    None if hidden is None else shape_of(hidden),
                    shape_of(given) if ends else None,
                )
                return given if ends else None

            with _looking(self.built.module):
                forward_only(self.line, sorted(new.values()), run, self.built.device)
            self._shapes.update({sign: found[number] for sign, number in new.items()})
        return [self._shapes[sign] for sign in signatures]

    def schedule(self, wires: Mapping[int, "Wires"], number: int) -> Callable[["Work"], None]:
        """Give what runs so many microbatches through the stages, over wires of some lengths."""
        wanted = (number, tuple(sorted(wires.items())))
        if wanted not in self._schedules:
            self._schedules[wanted] = scheduled(self, wires, number)
            if len(self._schedules) > KEPT:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(wanted)
        return self._schedules[wanted]


@attrs.frozen(order=True)
class Wires:
    """How much a stage takes and gives: elements, and the name of their data type."""

    taken: int
    taken_dtype: str
    given: int
    given_dtype: str


Work = Callable[[int, int, Tensor | None], Tensor]
"""``(stage, microbatch, wire) -> wire``; in the last stage, the loss."""


class StageModule(nn.Module):
    """What a schedule of torch runs as a stage: it has the stage's parameters, and does the work of the step."""

    def __init__(self, stage: int, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.stage = stage
        self.weights = nn.ParameterList(weights)
        self.work: Work | None = None

    def forward(self, wire: Tensor | None = None, *, number: Tensor) -> Tensor:
        """Run the stage on the microbatch of this number."""
        assert self.work is not None
        return self.work(self.stage, int(number), wire)


def scheduled(machine: Machine, wires: Mapping[int, Wires], number: int) -> Callable[[Work], None]:
    """Make torch's schedule over this process's stages.

    Everything that is sent is known beforehand, so that no pass is needed to find it out. Gradients are not scaled:
    torch would divide what has been added up already. Where a stage uses a parameter several times, the gradients of
    its parameters are not put off: torch 2.13 goes through some part of such a graph twice, which frees it.
    """
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    line, device = machine.line, machine.built.device
    modules = [StageModule(stage, _weights(machine, stage)) for stage in line.own]
    stages = [
        PipelineStage(
            module,
            module.stage,
            line.stages,
            device,
            input_args=_like(wires[module.stage].taken, wires[module.stage].taken_dtype),
            output_args=_like(wires[module.stage].given, wires[module.stage].given_dtype),
            group=line.group,
            dw_builder=_nothing_left if module.stage in machine.reused else None,
        )
        for module in modules
    ]
    kind: Any = get_schedule_class(line.kind.name)
    schedule = kind(
        stages[0] if line.kind.stages == 1 else stages, number, loss_fn=lambda loss, _: loss, scale_grads=False
    )
    numbers = torch.arange(number)

    def run(work: Work) -> None:
        for module in modules:
            module.work = work
        try:
            with quiet(), unwrapped(), line.world.explained():
                schedule.step(number=numbers, target=numbers, return_outputs=False)
        finally:
            for module in modules:
                module.work = None

    return run


def _nothing_left() -> Callable[[], None]:
    """Put nothing off: torch takes all gradients at once, and calls what this gives in the place of the rest."""
    return lambda: None


def _like(elements: int, dtype: str) -> Tensor:
    return torch.empty(elements, dtype=getattr(torch, dtype), device="meta", requires_grad=True)


def _weights(machine: Machine, stage: int) -> list[nn.Parameter]:
    """Give the parameters of a stage, each once; a schedule that puts their gradients off looks for them."""
    binding = machine.built.binding
    own = {site.tensor: None for site, name in binding.trainable if stage in machine.assignment.params[name]}
    return list(own)


@contextlib.contextmanager
def unwrapped() -> Any:
    """Raise what failed in a stage, and not torch's account of its arguments."""
    try:
        yield
    except RuntimeError as error:
        if "failed to run forward" in str(error) and isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


@contextlib.contextmanager
def _looking(module: nn.Module) -> Any:
    modes = evaluation_mode(module)
    try:
        with torch.no_grad():
            yield
    finally:
        modes.restore()


def first_sample(microbatch: Any) -> Any:
    """Cut the first sample out of a microbatch, where it can be cut."""
    samples = leading_dimension(microbatch)
    try:
        return microbatches(Batch(microbatch, samples, None), samples)[0]
    except ValueError:
        return microbatch


def signature(microbatch: Any) -> Signature:
    """Describe the form of a microbatch: shapes and data types, and whatever else is in it but fractions.

    It is the same in every process, and so has no addresses of objects in it.
    """
    kind = type(microbatch).__name__
    if isinstance(microbatch, Tensor):
        return tuple(microbatch.shape), str(microbatch.dtype)
    if isinstance(microbatch, Mapping):
        return (kind, *((str(name), signature(item)) for name, item in microbatch.items()))
    if isinstance(microbatch, tuple | list):
        return (kind, *map(signature, microbatch))
    return (kind,) if isinstance(microbatch, float) else (kind, describe(microbatch))
