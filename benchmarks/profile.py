"""The ``profile`` row: what a step does outside of the model, line by line, for each way of running steps.

Lines are functions that are timed in their places, each without the others that it calls; see
:mod:`~benchmarks.stopwatch`. The model is the smallest of the overhead row, of which a step of ordinary size has the
same lines: they do not depend on how long the model takes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

import attrs
import toolz
import torch

import forgather_fn as ff
from benchmarks.loops import by_trainer, columns, plan_of, streamed
from benchmarks.measure import Clock
from benchmarks.overhead import SMALL
from benchmarks.stopwatch import REST, Laps, Line, Profile, Stopwatch, profiled
from benchmarks.table import Table
from forgather_fn.testing.processes import processes

STEPS: Final = 400
WARMUP: Final = 20
STEP: Final = "forgather_fn.step"
AROUND: Final = "around the update: no graph, gates, reports"
KEY: Final = "derive and set the random key, put generators back"

MODEL: Final = (
    Line("forward", ("benchmarks.models:Transformer.__call__",), model=True),
    Line("the loss", ("forgather_fn.losses.base:Objective.weighed",), model=True),
    Line("backward: autograd", ("torch.autograd:_engine_run_backward",), model=True),
)
BEFORE: Final = (
    Line("make a batch of the data, look at the state", ("forgather_fn.strategy.program:as_batch",)),
    Line("the module stands on the state: look at each parameter", ("forgather_fn.built:Built.bound",)),
    Line("bring the batch to the device, cut it", ("forgather_fn.built:Built.parts", "forgather_fn.built:Built.place")),
    Line(
        KEY,
        (
            f"{STEP}:key",
            f"{STEP}:reseed",
            "forgather_fn.random:_Seeded.__enter__",
            "forgather_fn.random:_Seeded.__exit__",
        ),
    ),
)
PASSES: Final = (
    Line("zero gradients, look at each `grad`", ("forgather_fn.strategy.storage:workspace().clear",)),
    Line("how the model is called on the batch", ("forgather_fn.strategy.storage:call_arguments()",)),
    Line("check what the loss gave", ("forgather_fn.built:named_means",)),
    Line("go over the microbatches, let go of autograd's graph", (f"{STEP}:_accumulate",)),
    Line("leave all as it was if a pass fails", (f"{STEP}:passed", f"{STEP}:take_gradients")),
    Line("the inverse of the weight, as a scalar", (f"{STEP}:inverse",)),
    Line("torch's checks before autograd", ("torch.autograd:backward",)),
    Line("keep the loss in float64", ("forgather_fn.mean:Mean.detach",)),
    Line("which parameters have a gradient", ("forgather_fn.strategy.storage:workspace().collect",)),
)
CLIP: Final = Line("clip: the norm, and what divides", (f"{STEP}:apply_all",))
UPDATE: Final = (
    Line("the learning rate", (f"{STEP}:rates_at",)),
    CLIP,
    Line(
        "is all finite? the norm as clipped, plus the loss",
        (f"{STEP}:flag_on_host", "forgather_fn.gradient:Gradients.norm"),
    ),
    Line("the optimizer, and what it counts", ("forgather_fn:adamw().update",)),
    Line("the optimizer's kernels", ("torch:_fused_adamw_",), model=True),
    Line(AROUND, (f"{STEP}:advance", f"{STEP}:update_arrays")),
    Line("count updates and tokens", (f"{STEP}:_averaged", f"{STEP}:_counted")),
    Line("consume the state, make the next", (f"{STEP}:following", "forgather_fn.state:TrainState.consume")),
)
EAGER: Final = (*BEFORE, *PASSES, *UPDATE, *MODEL)
IN_BACKWARD: Final = (
    *BEFORE,
    *PASSES,
    Line("put a hook on each parameter", ("torch:Tensor.register_post_accumulate_grad_hook",)),
    Line("take each gradient as it comes", ("forgather_fn.in_backward:_Updates._update",)),
    Line("is it finite?", ("forgather_fn.in_backward:flag_on_host",)),
    Line("the learning rate", ("forgather_fn.in_backward:rates_at",)),
    Line(AROUND, ("forgather_fn.in_backward:update_arrays",)),
    *(line for line in UPDATE[1:] if line is not CLIP),
    *MODEL,
)
COMPILED: Final = (
    *BEFORE[:3],
    Line(
        KEY,
        (
            "forgather_fn.compiled:key",
            "forgather_fn.random:_Seeded.__enter__",
            "forgather_fn.random:_Seeded.__exit__",
        ),
    ),
    Line("the learning rate", ("forgather_fn.compiled:rates_at",)),
    Line("the tensors of the state, as a list", ("forgather_fn.compiled:_tensors",)),
    Line("rates, step and seed as scalars", ("forgather_fn.compiled:_scalars",)),
    Line("which graph", ("forgather_fn.compiled:Compiled._graphs",)),
    Line("look at the flag, make the next state", ("forgather_fn.compiled:_finished",)),
    Line("the graph, and the compiler's guards before it", ("forgather_fn.compiler:whole()",), model=True),
)
LOOP: Final = (
    Line("what is wanted of the step", ("forgather_fn.loop:Demand.at",)),
    Line("a report: a look at the numbers", ("forgather_fn:report().observe",)),
    Line("read the samples of a batch", ("forgather_fn.data.loading:Fetch.__getitem__",)),
    Line("the step", ("forgather_fn:single().step",), model=True),
)
TRAINER: Final = (
    Line("microbatches of the loader", ("forgather.ml.trainer.loop:LoopMixin.get_batch_samples",)),
    Line("weigh them", ("forgather.ml.trainer.loop:LoopMixin._window",)),
    Line("events", ("forgather.ml.trainer.callbacks.dispatch:CallbackHandler.call_event",)),
    Line("log, evaluate, save, as asked for", ("forgather.ml.trainer.loop:LoopMixin._look_up",)),
    Line(
        "books: tokens, operations, losses",
        (
            "forgather.ml.trainer.loop:LoopMixin.floating_point_ops",
            "forgather.ml.trainer.loop:LoopMixin._track_num_input_tokens",
            "forgather.ml.trainer.loop:LoopMixin._get_learning_rate",
        ),
    ),
    Line(
        "the live optimizer: its options now, and the update", ("forgather.ml.trainer.live_optimizer:Adopted.update",)
    ),
    Line("the optimizer's kernels", ("torch:_fused_adamw_",), model=True),
    Line("around the step: its parts, its batch", ("forgather.ml.trainer.loop:LoopMixin._step",)),
    Line("the step of the core", ("forgather_fn:single().step",), model=True),
)
ACROSS: Final = (
    Line(KEY, ("forgather_fn.replicated:key", "forgather_fn.replicated:reseed")),
    Line("this process's microbatches", ("forgather_fn.replicated:owned",)),
    Line(
        "pack and open the parcel",
        ("forgather_fn.parcel:packed", "forgather_fn.parcel:behind", "forgather_fn.parcel:opened"),
    ),
    Line(
        "add up losses and weights", ("forgather_fn.agreement:Agreement.sums", "forgather_fn.agreement:Agreement.means")
    ),
    Line("what the first step has told all", ("forgather_fn.agreement:Agreement.reach",)),
    Line("tell and compare which step it is", ("forgather_fn.alike:numbers", "forgather_fn.alike:checked")),
    Line("look for processes that ended", ("forgather_fn.world:World.begin",)),
    Line(
        "sums over processes, and the wait for them", ("forgather_fn.strategy.accelerated:all_reduced()",), model=True
    ),
)
ON_SHARDS: Final = (
    Line(KEY, ("forgather_fn.sharded:key", "forgather_fn.sharded:reseed")),
    Line("this process's microbatches", ("forgather_fn.sharded:in_step",)),
    Line("zero gradients", ("forgather_fn.strategy.sharding:shard_workspace().clear",)),
    Line("which parameters have a gradient", ("forgather_fn.strategy.sharding:shard_workspace().collect",)),
    Line("flags, the norm, losses, in one row", ("forgather_fn.sharded:_told",)),
    Line("the gradient of all processes", ("forgather_fn.sharded:_read",)),
    Line(
        "add up losses and weights", ("forgather_fn.agreement:Agreement.sums", "forgather_fn.agreement:Agreement.means")
    ),
    Line("tell and compare which step it is", ("forgather_fn.alike:numbers", "forgather_fn.alike:compare")),
    Line("look for processes that ended", ("forgather_fn.world:World.begin",)),
    Line(
        "sums over processes, and the wait for them",
        ("forgather_fn.strategy.sharding:added()", "forgather_fn.sharded:added()"),
        model=True,
    ),
)
PIPELINE: Final = (
    Line("this process's microbatches, and that all have the same", ("forgather_fn.pipeline.running:_given",)),
    Line(
        "shapes and lengths of what is sent",
        ("forgather_fn.pipeline.machine:Machine.shapes", "forgather_fn.pipeline.running:_wires"),
    ),
    Line("run a stage on a microbatch", ("forgather_fn.pipeline.running:_Passes.work",)),
    Line("losses, tied gradients and flags of all", ("forgather_fn.pipeline.running:_added",)),
    Line("torch's schedule: passes, transfers, waits", ("forgather_fn.pipeline.machine:scheduled()",), model=True),
    Line(
        "sums over processes, and the wait for them",
        ("forgather_fn.pipeline.line:Line.summed", "forgather_fn.world:World.rows"),
        model=True,
    ),
)


@attrs.frozen
class Arm:
    """A way of running steps.

    Attributes:
        name: For tables.
        lines: What is timed.
        make: Makes the function that takes a step.
        processes: How many run it together.
    """

    name: str
    lines: tuple[Line, ...]
    make: Callable[[], Callable[[], object]]
    processes: int = 1


def plan(**fields: Any) -> ff.Plan:
    """Make the plan of the overhead row."""
    return plan_of(SMALL, lambda: cast(Clock, lambda step: 1.0), **fields)


def stepping(program: ff.Program) -> Callable[[], object]:
    """Give the function that takes a program's next step."""
    held, batches = [program.init(0)], itertools.cycle(SMALL.batches)

    def step() -> None:
        held[0], _ = program.step(held[0], next(batches))

    return step


def ticking() -> Callable[[], object]:
    """Give the function that makes the next tick of a loop with a report at every step."""
    reports: list[Any] = []
    program = ff.single(plan())
    stages = ff.every(1, ff.report(reports.append)), ff.until(steps=1 << 40)
    ticks = iter(toolz.pipe(program.steps(program.init(0), streamed(SMALL, columns(SMALL))), *stages))
    return lambda: next(ticks)


def arms(backend: str) -> tuple[Arm, ...]:
    """Give all ways of running steps but the class layer; to add one, add a row."""
    return (
        Arm("ff.single", EAGER, lambda: stepping(ff.single(plan()))),
        Arm("ff.single, microbatches=4", EAGER, lambda: stepping(ff.single(plan(microbatches=4)))),
        Arm(
            'ff.single, update="in_backward", no clipping',
            IN_BACKWARD,
            lambda: stepping(ff.single(plan(update="in_backward", transforms=()))),
        ),
        Arm("ff.single, compile=True", COMPILED, lambda: stepping(ff.single(plan(compile=True, backend=backend)))),
        Arm("The loop: program.steps, a report at every step, until, a stream of columns", LOOP, ticking),
        Arm(
            "ff.accelerated, two processes",
            (*ACROSS, *EAGER),
            lambda: stepping(ff.accelerated(plan(microbatches=2))),
            processes=2,
        ),
        Arm(
            "ff.accelerated, sharded=True, two processes",
            (*ON_SHARDS, *EAGER),
            lambda: stepping(ff.accelerated(plan(microbatches=2), sharded=True)),
            processes=2,
        ),
        Arm(
            "ff.pipelined, two processes, four microbatches",
            (*PIPELINE, *EAGER),
            lambda: stepping(ff.pipelined(plan(microbatches=4), {"blocks.0": "end"})),
            processes=2,
        ),
    )


def run(quick: bool) -> Iterator[Table]:
    """Profile each way of running steps."""
    steps, warmup = (3, 2) if quick else (STEPS, WARMUP)
    backend = "aot_eager" if quick else "inductor"
    for number, arm in enumerate(arms(backend)):
        if arm.processes == 1:
            yield _table(arm.name, arm.lines, profiled(arm.make, arm.lines, steps, warmup))
        else:
            with processes(arm.processes, timeout=300.0) as pool:
                yield _table(arm.name, arm.lines, pool.run(in_one, number, backend, steps, warmup)[0])
    yield _table("forgather.ml.Trainer", TRAINER, _trained(steps, warmup))


def in_one(number: int, backend: str, steps: int, warmup: int) -> Profile:
    """Profile an arm in one of its processes."""
    torch.set_num_threads(1)
    arm = arms(backend)[number]
    return profiled(arm.make, arm.lines, steps, warmup)


@attrs.define
class _Lapping:
    """A schedule that tells where steps end; it is asked for each group of parameters."""

    laps: Laps
    step: int = -1

    def __call__(self, step: int) -> float:
        if step != self.step:
            self.step = step
            self.laps.lap()
        return 1.0


def _trained(steps: int, warmup: int) -> Profile:
    """Profile the class layer, whose steps end where its scheduler is called."""
    task = attrs.evolve(SMALL, warmup=warmup, steps=steps)
    watch = Stopwatch()
    watch.calibrate()
    laps = Laps(watch, warmup)
    with watch.watching(TRAINER):
        by_trainer(task, cast(Clock, _Lapping(laps)))
    return laps.profile(TRAINER)


def _table(name: str, lines: Sequence[Line], profile: Profile) -> Table:
    own = {line.what: profile.microseconds[line.what] for line in lines if not line.model and profile.calls[line.what]}
    own[REST] = profile.microseconds[REST]
    rest = {line.what: profile.microseconds[line.what] for line in lines if line.model and profile.calls[line.what]}
    whole = sum((*own.values(), *rest.values()))
    ordered = sorted(own.items(), key=lambda item: -item[1])
    return Table(
        title=f"{name}: outside of the model",
        columns=("what", "microseconds", "of the step", "calls"),
        lines=(
            *(
                (what, f"{took:.1f}", f"{took / whole:.1%}", f"{profile.calls[what]:.3g}" if what != REST else "")
                for what, took in ordered
            ),
            ("**together**", f"**{sum(own.values()):.0f}**", f"**{sum(own.values()) / whole:.1%}**", ""),
            *(
                (f"*{what}*", f"*{took:.0f}*", f"*{took / whole:.1%}*", f"*{profile.calls[what]:.3g}*")
                for what, took in rest.items()
            ),
        ),
        results=({"arm": name, "microseconds": dict(profile.microseconds), "calls": dict(profile.calls)},),
    )
