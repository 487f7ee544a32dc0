"""Several processes of one machine: a step of ours beside one of DistributedDataParallel through Accelerate."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs
from torch import distributed
from torch.optim.lr_scheduler import LambdaLR

import forgather_fn as ff
from benchmarks.measure import TOLERANCE, ratio, spread
from benchmarks.models import next_token_loss
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import MAX_NORM, PEAK, WEIGHT_DECAY, Task, optimizer_of
from forgather_fn import alike, parcel
from forgather_fn.layout import Layout
from forgather_fn.testing.processes import processes
from forgather_fn.world import World

TASKS: Final[Mapping[str, Task]] = {task.name: task for task in (SMALL, DEEP, LARGE)}
ROUNDS: Final = 9
STEPS: Final = 12
LIMIT: Final = 1.0

Step = Callable[[int], None]


def run(quick: bool) -> Iterator[Table]:
    """Measure two processes against Accelerate's DDP, and one, two and four against each other."""
    rounds, steps = (1, 2) if quick else (ROUNDS, STEPS)
    names = list(TASKS)[:1] if quick else list(TASKS)
    sizes = (1, 2) if quick else (1, 2, 4)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for size in sizes:
        with processes(size, timeout=600.0) as pool:
            found[size] = {name: pool.run(measured, name, rounds, steps)[0] for name in names}
    yield _beside_ddp(found[2])
    yield _by_size(found)


def measured(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Let both take turns, on each of the processes; every turn begins when all are ready.

    Losses are compared after the first turn. Both go on from there, and what they differ by in the last bits grows with
    each update: on the largest model from 1e-7 after 12 to 2e-5 after 120, also on one process.

    Raises:
        ValueError: They did not come to the same loss.
    """
    task = attrs.evolve(TASKS[name], warmup=steps, steps=rounds * steps)
    ours, our_loss, sent = _ours(task)
    theirs, their_loss = _ddp(task)
    times: dict[str, list[float]] = {"forgather_fn": [], "DDP": []}
    for turn in range(rounds + 1):
        for arm, step in zip(times, (ours, theirs), strict=True):
            distributed.barrier()
            began = time.perf_counter()
            for i in range(turn * steps, (turn + 1) * steps):
                step(i)
            if turn:  # the first one warms up
                times[arm].append((time.perf_counter() - began) / steps)
        if not turn:
            losses = our_loss(), their_loss()
            if not math.isclose(*losses, rel_tol=TOLERANCE):
                raise ValueError(
                    f"{name}: after {steps} steps ours is at the loss {losses[0]!r}, DDP at {losses[1]!r}: they did "
                    "not do the same"
                )
    return {"times": times, "bytes": sent, "losses": losses}


def _rise(step: int) -> float:
    return min((step + 1) / 5, 1.0)


def _ours(task: Task) -> tuple[Step, Callable[[], float], int]:
    plan = ff.Plan(
        model=task.model,
        loss=ff.losses.causal_lm,
        optimizer=ff.adamw(weight_decay=WEIGHT_DECAY),
        schedule=lambda step: PEAK * _rise(step),
        transforms=(ff.clipped(MAX_NORM),),
        microbatches=distributed.get_world_size(),
    )
    program = ff.accelerated(plan)
    state = [program.init(0)]

    def step(i: int) -> None:
        state[0], _ = program.step(state[0], task.batches[i])

    layout = state[0].read().params.layout
    return step, lambda: task.loss(program.export(state[0])), traffic(layout, 1, program.world)


def _ddp(task: Task) -> tuple[Step, Callable[[], float]]:
    """Train as Accelerate's documentation does, with the batch of each process cut out beforehand."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank, size = accelerator.process_index, accelerator.num_processes
    own = [
        {name: rows.tensor_split(size)[rank] for name, rows in batch.items()}
        for batch in itertools.islice(task.batches, task.updates)
    ]
    inner = task.model()
    optimizer = optimizer_of(inner)
    scheduler = LambdaLR(optimizer, lambda step: _rise(step // size))  # Accelerate steps it once for each process
    model, optimizer, scheduler = accelerator.prepare(inner, optimizer, scheduler)

    def step(i: int) -> None:
        optimizer.zero_grad()
        loss = next_token_loss(model(own[i]["input_ids"]), own[i]["labels"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()

    return step, lambda: task.loss(inner)


def _beside_ddp(found: Mapping[str, Mapping[str, Any]]) -> Table:
    lines, reach = [], []
    for name, result in found.items():
        ours, theirs = result["times"]["forgather_fn"], result["times"]["DDP"]
        times = (spread(ours, 1e-3), spread(theirs, 1e-3))
        lines.append((name, *times, f"{ratio(ours, theirs):.3f}", f"{result['bytes']:,}"))
        reach.append(Reach(f"{name}, 2 processes, against DDP", ratio(ours, theirs), LIMIT))
    return Table(
        title="Two processes on one machine, over gloo",
        notes=("Wall time of a step. Both came to the same loss. Each process computes with one thread.",),
        columns=("model", "forgather_fn, ms", "DDP through Accelerate, ms", "ratio", "bytes a process sends a step"),
        lines=tuple(lines),
        reach=tuple(reach),
        results=tuple({"model": name, **result} for name, result in found.items()),
    )


def _by_size(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Table:
    lines = []
    for size, models in found.items():
        for name, result in models.items():
            middle = {arm: statistics.median(times) for arm, times in result["times"].items()}
            lines.append((str(size), name, *(f"{middle[arm] * 1e3:.3f}" for arm in ("forgather_fn", "DDP"))))
    return Table(
        title="The same batch on more processes",
        notes=("Wall time of a step. Beyond the cores of the machine, processes wait for each other.",),
        columns=("processes", "model", "forgather_fn, ms", "DDP through Accelerate, ms"),
        lines=tuple(lines),
        results=tuple({"processes": size, "models": models} for size, models in found.items()),
    )


def traffic(layout: Layout, names: int, world: World) -> int:
    """Count the bytes that each process sends in a step, where sums are taken around a ring.

    Args:
        layout: Of the parameters.
        names: How many means the loss has.
        world: The processes.
    """
    room = parcel.size(len(layout.leaves), 2 * names + alike.NUMBERS, world.size)
    return 2 * (world.size - 1) * (layout.bytes + room * layout.dtypes[0].itemsize) // world.size
