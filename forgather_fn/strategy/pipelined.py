"""Training a model that is cut into stages, one or several to a process."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs
import torch
from torch import nn

from forgather_fn.built import Built
from forgather_fn.execution import Execution
from forgather_fn.losses import Objective
from forgather_fn.meta import on_meta
from forgather_fn.metrics import Measure
from forgather_fn.model import build, call_arguments
from forgather_fn.pipeline import inference
from forgather_fn.pipeline.alone import proved
from forgather_fn.pipeline.balance import balanced, measured
from forgather_fn.pipeline.cuts import Assignment, SplitError, SplitSpec, cuts_of
from forgather_fn.pipeline.line import Line, lined_up
from forgather_fn.pipeline.machine import Machine
from forgather_fn.pipeline.preparing import assigned_by, assignment_of, stage_prepared
from forgather_fn.pipeline.probe import stand_ins
from forgather_fn.pipeline.running import Pipeline, pipelining
from forgather_fn.pipeline.schedules import Kind, ScheduleError, arrange, kind_of
from forgather_fn.pipeline.ties import Ties, ties_of
from forgather_fn.plan import Plan, check_plan
from forgather_fn.portion import Portion
from forgather_fn.program import Program
from forgather_fn.share import Share
from forgather_fn.state import Params, TrainState
from forgather_fn.strategy.accelerated import ALL_VIEWED
from forgather_fn.strategy.processes import check_same_plan, launched_on
from forgather_fn.strategy.program import Inference, Strategy, assembled
from forgather_fn.strategy.storage import Storage, floating, held_whole, prepared
from forgather_fn.world import ALONE, World, known_to_all


def pipelined(
    plan: Plan,
    split_spec: SplitSpec | Literal["auto"],
    *,
    schedule: str = "1F1B",
    stages_per_rank: int | None = None,
    pipelines: int = 1,
    example: Any = None,
) -> Program:
    """Make the program of a plan whose model is cut into stages, spread over the processes of a launcher.

    A step is that of one device: the same microbatches, the gradient of the same mean, clipped by its norm over all
    stages, the same update. Each process has the parameters, and the optimizer's state, of its stages alone. The model
    is not edited and not traced: each stage runs its own forward, of which the rest is passed over; the first batch
    proves that nothing but one hidden state crosses a cut.

    Args:
        plan: The recipe. Its microbatches go through the stages one after the other. A module in it is freed of the
            stages of other processes by ``init``; one on the meta device, with ``Plan(init="by_name")``, never has
            them.
        split_spec: For each module at which the model is cut, ``"end"`` or ``"beginning"``; one more stage than cuts.
            ``"auto"`` cuts between its blocks, so that the largest stage has as few parameters as can be; given an
            example, so that the slowest takes as little time.
        schedule: In which order processes work: one of GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble,
            ZBVZeroBubble, DualPipeV. It also says which stages a process has.
        stages_per_rank: Stages of one process; by default, as many as there are for each.
        pipelines: How many equal pipelines there are, each with a block of the plan's microbatches.
        example: A batch, by which it is found which stage uses which parameter. Needed where modules are not
            registered in the order in which they run; the first batch tells.

    Returns:
        The record of functions, as of :func:`~forgather_fn.strategy.single.single`. All but ``module`` are collective:
        every process calls them. ``state.params`` has the parameters of this process's stages, under their names.

    Raises:
        SplitError: The model cannot be cut there.
        ScheduleError: The schedule cannot run with these sizes; those that would do are named.
        ValueError: The plan asks for what this strategy does not do.
    """
    check_plan("pipelined", plan)
    _check(plan)
    world = launched_on(plan.device).of_program()
    ranks, stages = _sizes(world, split_spec, kind_of(schedule), stages_per_rank, pipelines)
    share = Share(plan.microbatches, world.rank // ranks, pipelines)
    if ranks > 1:
        arrange(schedule, ranks=ranks, stages=stages, microbatches=len(share.block))
    line = lined_up(world, kind_of(schedule), stages, ranks)
    plan = attrs.evolve(plan, viewed_elements=ALL_VIEWED, device=_own_device(plan.device, world))
    stand = _Standing(plan, split_spec, line, share, example)
    if isinstance(plan.model, nn.Module) and not isinstance(split_spec, str):
        cuts_of(plan.model, split_spec)  # now, and not only when the program is first used
    return assembled(
        plan,
        Strategy(
            execution=stand.execution,
            world=world,
            cut_over=world if ranks > 1 else ALONE,
            share=share if pipelines > 1 else None,
            storage=stand.storage(),
            inference=Inference(stand.evaluate, stand.apply) if ranks > 1 else None,
            portion=stand.portion,
        ),
    )


_WHY: Final = {
    "compile": "a stage is left in the middle of the model's forward, which a graph cannot be",
    'update="in_backward"': "gradients of several microbatches, and of tied parameters, are added before the update",
    "loss": "it changes the model's head, which some stages have not; take a loss that is not chunked",
}


def _check(plan: Plan) -> None:
    given = {
        "compile": bool(plan.compile),
        'update="in_backward"': plan.update == "in_backward",
        "loss": isinstance(plan.loss, Objective) and plan.loss.around is not None,
    }
    for name, reason in _WHY.items():
        if given[name]:
            raise ValueError(f"pipelined: Plan({name if '=' in name else name + '=...'}) cannot be: {reason}")


def _own_device(device: torch.device, world: World) -> torch.device:
    """Give each process of a machine an accelerator of its own, where none is named."""
    if device.type == "cpu" or device.index is not None or world.size == 1:
        return device
    torch.accelerator.set_device_index(world.local_rank)
    return torch.device(device.type, world.local_rank)


def _sizes(
    world: World, spec: SplitSpec | str, kind: Kind, stages_per_rank: int | None, pipelines: int
) -> tuple[int, int]:
    for name, number in {
        "pipelines": pipelines,
        "stages_per_rank": 1 if stages_per_rank is None else stages_per_rank,
    }.items():
        if type(number) is not int or number < 1:
            raise ScheduleError(f"pipelined: {name} must be an integer of at least 1, got {number!r}")
    if world.size % pipelines:
        raise ScheduleError(f"{world.size} processes cannot be spread evenly over pipelines={pipelines}")
    ranks = world.size // pipelines
    if ranks == 1 and pipelines > 1:
        raise ScheduleError(
            f"pipelines={pipelines} on {world.size} processes are pipelines of one process; use ff.accelerated"
        )
    if spec == "auto":
        return ranks, ranks * (stages_per_rank or kind.stages or 1) if ranks > 1 else max(2, stages_per_rank or 2)
    if not isinstance(spec, Mapping) or not spec:
        raise SplitError(
            f"split_spec: expected a mapping of modules' names to 'beginning' or 'end', or 'auto'; got {spec!r}"
        )
    stages = len(spec) + 1
    if stages_per_rank is not None and stages != stages_per_rank * ranks:
        raise ScheduleError(
            f"split_spec has {len(spec)} cuts and so {stages} stages, but stages_per_rank={stages_per_rank} on {ranks} "
            f"processes are {stages_per_rank * ranks}: use {stages_per_rank * ranks - 1} cuts"
        )
    return ranks, stages


@attrs.define(eq=False)
class _Standing:
    """A pipelined program of one process: what is known of it before the model is built, and then its machine."""

    plan: Plan
    spec: SplitSpec | str
    line: Line
    share: Share
    example: Any = None
    assignment: Assignment | None = None
    machine: Machine | None = None
    ties: Ties | None = None
    trained: tuple[str, ...] = ()

    def prepare(self, plan: Plan, seed: int) -> nn.Module:
        """Build the module and give it the values of this process's stages."""
        module = build(plan.model, seed)
        if self.assignment is None:
            cuts = cuts_of(module, self._spec(module))
            self.assignment = (
                assignment_of(module, cuts)
                if self.example is None
                else assigned_by(module, cuts, call_arguments(module, plan.loss), self.example)
            )
        self.agree(module)
        if self.line.ranks == 1:
            return prepared(attrs.evolve(plan, model=module), seed)
        stage_prepared(plan, seed, module, self.line, self.assignment, floating(plan))
        for rank, trains in enumerate(self.line.world.gather(any(p.requires_grad for p in module.parameters()))):
            if not trains:
                raise known_to_all(
                    SplitError(
                        f"split_spec: rank {rank} has no parameter to train, since those of its stages are frozen; cut "
                        "the model so that each process has one that asks for a gradient"
                    )
                )
        return module

    def storage(self) -> Storage:
        """Hold the parameters of this process's stages."""
        whole = held_whole(lambda layout, tensors: None)  # values are made the same before they are freed
        export = self.export if self.line.ranks > 1 else whole.export
        return attrs.evolve(whole, prepare=self.prepare, export=export)

    def _spec(self, module: nn.Module) -> SplitSpec:
        """Read the cuts, or find them: the first process measures for all."""
        if not isinstance(self.spec, str):
            return self.spec
        if self.example is None or on_meta(module):
            return balanced(module, self.line.stages)
        args, kwargs = call_arguments(module, self.plan.loss)(self.example)
        seconds = self.line.world.first(lambda: measured(module, lambda: module(*args, **kwargs)))
        return balanced(module, self.line.stages, seconds)

    def execution(self, built: Built) -> Execution:
        """Run steps on the pipeline; on one process, as one device does, when its stages are proved."""
        assert self.assignment is not None
        machine = self.machine = Machine(built, self.line, self.assignment)
        if self.line.ranks == 1:
            return proved(machine, self.share)
        index = built.binding.layout.index
        self.ties = ties_of(self.line, self.assignment, index)
        everywhere = {name for own in self.line.world.gather(tuple(index)) for name in own}
        self.trained = tuple(name for name in self.assignment.params if name in everywhere)
        return pipelining(Pipeline(machine, self.ties, self.share))

    def portion(self) -> Portion | None:
        """Tell which portion of a state this process has."""
        if self.line.ranks == 1:
            return None
        assert self.assignment is not None
        assert self.ties is not None
        stages = frozenset(self.line.own)
        own = frozenset(name for name, used in self.assignment.params.items() if used & stages)
        keeper = self._running().keeper
        return Portion(
            number=self.line.rank,
            count=self.line.ranks,
            writes=self.line.number == 0,
            order=self.trained,
            own=own,
            named=own - self.ties.foreign,
            buffers=frozenset(name for name in self.assignment.buffers if keeper(name) in stages),
        )

    def agree(self, module: nn.Module) -> None:
        """Make sure that all processes have the same plan, cuts and model, before values are sent from one to others.

        Raises:
            ValueError: They have not.
        """
        mine = {
            **self.plan.describe(),
            "split_spec": str(self.assignment and self.assignment.cuts),
            "pipelined(schedule)": self.line.kind.name,
            "parameters": ", ".join(f"{name} {tuple(p.shape)}" for name, p in stand_ins(module).items()),
        }
        mine.pop("device")
        check_same_plan("pipelined", self.line.world, mine)

    def evaluate(
        self, built: Built, state: TrainState, data: Any, params: Params, metrics: Sequence[Measure]
    ) -> dict[str, float]:
        """Measure a state; see :func:`~forgather_fn.pipeline.inference.evaluate`."""
        return inference.evaluate(self._running(), built, state, data, params, metrics)

    def apply(
        self,
        built: Built,
        state: TrainState,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        params: Params,
    ) -> Any:
        """Call the model; see :func:`~forgather_fn.pipeline.inference.apply`."""
        return inference.apply(self._running(), built, state, inputs, named, params)

    def export(self, built: Built, state: TrainState, params: Params) -> nn.Module:
        """Take the model out; see :func:`~forgather_fn.pipeline.inference.export`."""
        return inference.export(self._running(), built, state, params)

    def _running(self) -> Machine:
        assert self.machine is not None
        return self.machine
