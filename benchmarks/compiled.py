"""The ``compiled`` row: the whole step as one graph, against loops whose model alone is compiled.

Compilers are given their time: what is compiled is kept from round to round, and only steps are timed. How long the
first call takes, and that of a second process, is a table of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs

import forgather_fn as ff
from benchmarks import models, peers
from benchmarks.arms import ALONE, LOADED, TORCH_LOADER, left_out
from benchmarks.loops import by_hand_with, by_program, columns, plan_of, streamed
from benchmarks.measure import NO_DATA, TOLERANCE, Arm, Clock, Result, Train, interleaved, ratio, spread
from benchmarks.models import Shape
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import Task

ROUNDS: Final = 11
STARTS: Final = 3
"""Processes that are timed from their first call; each compiles everything."""

MODEL_ONLY: Final = "hand-written, model.compile()"
WHOLE: Final = "forgather_fn, compile=True"
PART: Final = 'forgather_fn, compile="model"'

LLAMA = Task(
    name="tiny Llama",
    shape=Shape(vocabulary=256, width=32, layers=2, heads=4, context=16),
    batch_size=4,
    warmup=10,
    steps=40,
    build=models.llama,
)

LIMITS: Final = {SMALL: (0.33, 0.40), DEEP: (0.40, None)}
"""Of the hand-written eager loop, CPU time: the step alone, and with data loading in process."""


def run(quick: bool) -> Iterator[Table]:
    """Measure each model; quick: the smallest, alone, without a compiler's backend."""
    backend = "aot_eager" if quick else "inductor"
    for task in (SMALL,) if quick else (SMALL, DEEP, LARGE):
        timed, rounds = (attrs.evolve(task, warmup=2, steps=3), 1) if quick else (task, ROUNDS)
        size = f"{task.size}, {rounds} rounds of {timed.steps} steps"
        alone = interleaved(timed, (*ALONE, *_alone(backend)), rounds)
        yield _table(f"The compiled step alone: {size}", alone, _reach(task, alone, 0))
        if quick:
            return
        loaded = interleaved(timed, (LOADED[1], *_loaded(backend)), rounds)
        yield _table(f"The compiled step with data loading in process: {size}", loaded, _reach(task, loaded, 1))
    yield _llama()
    yield _first_calls()


def _alone(backend: str) -> tuple[Arm, ...]:
    return (
        Arm(MODEL_ONLY, NO_DATA, kept(lambda task: compiled_by_hand(task, backend))),
        Arm(PART, NO_DATA, kept(lambda task: compiled_program(task, backend, compile="model"))),
        Arm(WHOLE, NO_DATA, kept(lambda task: compiled_program(task, backend, compile=True))),
    )


def memory_arms() -> tuple[Arm, ...]:
    """Give the arms whose memory is measured: the whole step, and the model alone."""
    return (_alone("inductor")[0], _alone("inductor")[2])


def _loaded(backend: str) -> tuple[Arm, ...]:
    whole = kept(lambda task: compiled_program(task, backend, compile=True, data=lambda: streamed(task, columns(task))))
    return (Arm(WHOLE, "yes: batches(columns)", whole),)


def kept(make: Callable[[Task], Train]) -> Train:
    """Compile once, in the first round, and train again and again."""
    made: dict[Task, Train] = {}

    def train(task: Task, clock: Clock) -> Any:
        if task not in made:
            made[task] = make(task)
        return made[task](task, clock)

    return train


def compiled_by_hand(task: Task, backend: str) -> Train:
    """Compile the model of the hand-written loop, as torch's documentation has it."""
    model = task.model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.compile(backend=backend)

    def train(task: Task, clock: Clock) -> Any:
        model.load_state_dict(start)
        model.zero_grad()
        return by_hand_with(model, clock, task.batches)

    return train


def compiled_program(task: Task, backend: str, *, compile: bool | str, data: Callable[[], Any] | None = None) -> Train:
    """Make a program of a task, to be used in every round with that round's clock."""
    clocks: list[Clock] = []
    program = ff.single(plan_of(task, lambda: clocks[-1], compile=compile, backend=backend))

    def train(task: Task, clock: Clock) -> Any:
        clocks[:] = [clock]
        return by_program(program, task, task.batches if data is None else data())

    return train


def _reach(task: Task, results: Sequence[Result], column: int) -> tuple[Reach, ...]:
    ours = next(result for result in results if result.arm.name == WHOLE)
    if task is LARGE and column == 0:
        theirs = next(result for result in results if result.arm.name == MODEL_ONLY)
        return (Reach(f"{WHOLE}, against {MODEL_ONLY}", ratio(ours.cpu, theirs.cpu), 0.95),)
    limit = LIMITS.get(task, (None, None))[column]
    return () if limit is None else (Reach(WHOLE, ratio(ours.cpu, results[0].cpu), limit),)


def _table(title: str, results: Sequence[Result], reach: tuple[Reach, ...]) -> Table:
    base = results[0]
    return Table(
        title=title,
        notes=(
            "Clipping, AdamW, a schedule by step, as in the other rows; compiled before the clock starts.",
            *left_out(),
            f"Held-out losses are equal within {TOLERANCE}, relatively.",
        ),
        columns=("loop", "data loading", "CPU ms a step", "wall ms a step", "CPU ratio", "loss"),
        lines=tuple(
            (
                result.arm.name,
                result.arm.data,
                spread(result.cpu, 1e-3),
                spread(result.wall, 1e-3),
                f"{ratio(result.cpu, base.cpu):.3f}",
                f"{statistics.median(result.losses):.6f}",
            )
            for result in results
        ),
        reach=reach,
        results=tuple(result.as_json() for result in results),
    )


def _llama() -> Table:
    """Compare with transformers.Trainer, which compiles the model."""
    theirs = Arm(
        "transformers.Trainer, torch_compile=True",
        TORCH_LOADER,
        lambda task, clock: peers.by_transformers(task, clock, torch_compile=True),
    )
    results = interleaved(LLAMA, (theirs, *_loaded("inductor")), 9)
    reach = (Reach(f"{WHOLE}, against {theirs.name}", ratio(results[1].cpu, results[0].cpu), 0.45),)
    return _table(f"{LLAMA.size}, 9 rounds of {LLAMA.steps} steps", results, reach)


PROGRAM: Final = """
import json, time
import torch
torch.set_num_threads(1)
from benchmarks import compiled, overhead
from benchmarks.measure import Clock
import attrs
task = attrs.evolve(overhead.SMALL, warmup=0, steps=1)
torch.randn(2, 2) @ torch.randn(2, 2)
import torch._inductor.compile_fx
make = {{"hand": lambda: compiled.compiled_by_hand(task, "inductor"),
         "ours": lambda: compiled.compiled_program(task, "inductor", compile=True)}}[{arm!r}]
train = make()
began = time.perf_counter()
train(task, Clock(task))
print(json.dumps(time.perf_counter() - began))
"""


def _first_calls() -> Table:
    """Time a run of two steps in a fresh process: with an empty cache on the disk, then with the one it has left."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(STARTS):
        for arm in ("hand", "ours"):
            with tempfile.TemporaryDirectory() as cache:
                for start in ("first", "second"):
                    times.setdefault((arm, start), []).append(_start(arm, cache))
    middle = {key: statistics.median(found) for key, found in times.items()}
    named = {"hand": MODEL_ONLY, "ours": WHOLE}
    return Table(
        title=f"First call: {SMALL.name}, {STARTS} times",
        notes=("Two steps in a fresh process: with no cache on the disk, and again with what the first has left.",),
        columns=("loop", "first s", "second s", "second / first"),
        lines=tuple(
            (
                named[arm],
                spread(times[arm, "first"], 1.0),
                spread(times[arm, "second"], 1.0),
                f"{middle[arm, 'second'] / middle[arm, 'first']:.2f}",
            )
            for arm in named
        ),
        reach=(
            Reach(f"{WHOLE}, first call against {MODEL_ONLY}", middle["ours", "first"] / middle["hand", "first"], 2.0),
            Reach(f"{WHOLE}, second start against the first", middle["ours", "second"] / middle["ours", "first"], 0.3),
        ),
        results=tuple({"arm": named[arm], "start": start, "wall": found} for (arm, start), found in times.items()),
    )


def _start(arm: str, cache: str) -> float:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(arm=arm)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{arm} failed: {ended.stderr.strip()}")
    return float(json.loads(ended.stdout.splitlines()[-1]))
