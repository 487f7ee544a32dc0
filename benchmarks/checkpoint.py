"""The ``checkpoint`` row: what saving and loading take, against torch's own functions on a state of the same size.

Training is *blocked* by the observer's own call, and by what the next update waits for until its state has been copied.
An arm's older files are read and removed before each round, outside of what is timed, so that the new ones go to memory
that is at hand: virtual machines take idle memory away, and its first touch costs more than the write.
"""

import copy
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import toolz
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import forgather_fn as ff
from benchmarks.measure import NO_DATA, Arm, Clock, interleaved, ratio, spread
from benchmarks.overhead import LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import MAX_NORM, PEAK, WEIGHT_DECAY, Task
from benchmarks.turns import Spent, Timed, in_turns, timing
from forgather_fn.checkpoint import latest, saved
from forgather_fn.loop import Course, Run
from forgather_fn.stages import Observe, Observer

ROUNDS: Final = 9
INTERVAL: Final = 20
BLOCKED_LIMIT: Final = 0.05
WRITTEN_LIMIT: Final = 0.8
LOADED_LIMIT: Final = 1.0

TORCH: Final = "torch.save, fsync"
SAVED: Final = "saved(keep=2)"
BLOCKED: Final = "saved: training is blocked"
WRITTEN: Final = "saved: until it is committed, nothing else going on"
STEP: Final = "a step"
BESIDE: Final = "a step beside a save"
FIRST: Final = "saved, the first time: training is blocked"
TORCH_LOAD: Final = "torch.load"
TORCH_RESTORE: Final = "torch.load, load_state_dict"
RESTORE: Final = "program.restore"


@attrs.frozen(kw_only=True)
class Shape:
    """How large a state is: an MLP of square layers with AdamW's two slots, 12 bytes a parameter."""

    width: int
    layers: int
    batch_size: int


BIG: Final = Shape(width=3000, layers=5, batch_size=16)
"""45 million parameters, 540 MB."""

TINY: Final = Shape(width=200, layers=5, batch_size=16)


def run(quick: bool) -> Iterator[Table]:
    """Measure saving and loading on one state, then a training that saves again and again."""
    rounds = 2 if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=_disk()) as directory:
        both = Both(TINY if quick else BIG, Path(directory))
        try:
            saves = in_turns([both.torch_save, both.written, both.blocked, both.first, both.step_alone], rounds)
            yield _saving(both, saves, rounds)
            loads = in_turns([both.torch_load, both.torch_restore, both.restore], rounds)
            yield _loading(both, loads, rounds)
        finally:
            both.close()
            del both
        task = attrs.evolve(SMALL if quick else LARGE, warmup=INTERVAL, steps=INTERVAL if quick else 2 * INTERVAL)
        yield _training(task, Path(directory), rounds)


def _disk() -> str:
    """Choose where to write: not to a file system in memory, as ``/tmp`` is on some machines."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())


class Both:
    """The same state in the hands of this library and of a loop written by hand, and the arms that save and load it."""

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.file, self.run = directory / "state.pt", directory / "run"
        self.batch, model = _drawn(shape)
        self.model = copy.deepcopy(model)
        self.optimizer = AdamW(self.model.parameters(), fused=True)
        nn.functional.mse_loss(self.model(self.batch[0]), self.batch[1]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plan = ff.Plan(model=model, loss=ff.losses.mse, optimizer=ff.adamw(), schedule=1e-4)
        self.program = ff.single(self.plan)
        self.state, self.metrics = self.program.step(self.program.init(0), self.batch)
        self.stream = Run(self.program, [], 0, None, Course(self.state, ()))
        self.observer = saved(self.run)
        self.observer.open(self.program.steps(self.state, []))

    def torch_save(self) -> Mapping[str, Spent]:
        """Save by hand, and wait for the disk."""
        _remove(self.file.parent.glob(self.file.name))
        with timing() as spent, self.file.open("wb") as file:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1}
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return {TORCH: spent}

    def written(self) -> Mapping[str, Spent]:
        """Save in the background, and do nothing but wait for it."""
        tick = self.tick(self.run)
        with timing() as spent:
            self.observer.observe(tick)
            self.observer.end(tick)
        return {WRITTEN: spent}

    def blocked(self) -> Mapping[str, Spent]:
        """Save in the background, make a step meanwhile, and count for how long the training did nothing else."""
        blocked, beside = self._beside(self.run, self.observer)
        return {BLOCKED: blocked, BESIDE: beside}

    def first(self) -> Mapping[str, Spent]:
        """Do so with an observer that has no memory yet to copy to."""
        run = self.run.with_name("first")
        observer = saved(run)
        observer.open(self.program.steps(self.state, []))
        blocked, _ = self._beside(run, observer)
        observer.close()
        return {FIRST: blocked}

    def _beside(self, run: Path, observer: Observer) -> tuple[Spent, Spent]:
        tick, noted = self.tick(run), list[float]()

        def note() -> None:
            noted.append(time.perf_counter())

        tick.state.lend(note)  # called when the update begins
        with timing() as observed:
            observer.observe(tick)
        tick.state.lend(note)  # called when it need not wait any more
        with timing() as step:
            self.state, self.metrics = self.program.step(tick.state, self.batch)
        observer.end(tick)
        begun, allowed = noted
        return Spent(observed.wall + allowed - begun), step

    def step_alone(self) -> Mapping[str, Spent]:
        """Make a step."""
        with timing() as spent:
            self.state, self.metrics = self.program.step(self.state, self.batch)
        return {STEP: spent}

    def tick(self, run: Path) -> ff.Tick:
        """Make a step, so that the next checkpoint is a new one, and room for it in the run."""
        self.state, self.metrics = self.program.step(self.state, self.batch)
        _remove((run / "checkpoints").glob("checkpoint-*"))
        self.stream.course.state = self.state
        return ff.Tick(self.state, self.metrics, self.batch, self.stream)

    def torch_load(self) -> Mapping[str, Spent]:
        """Read by hand."""
        with timing() as spent:
            torch.load(self.file, weights_only=True)
        return {TORCH_LOAD: spent}

    def torch_restore(self) -> Mapping[str, Spent]:
        """Read by hand, into model and optimizer."""
        with timing() as spent:
            state = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        return {TORCH_RESTORE: spent}

    def restore(self) -> Mapping[str, Spent]:
        """Read into a state, by a program that has a model."""
        with timing() as spent:
            self.program.restore(self.run)
        return {RESTORE: spent}

    def sizes(self) -> tuple[int, int]:
        """Count the bytes of both on the disk."""
        newest = latest(self.run)
        assert newest is not None
        return self.file.stat().st_size, sum(file.stat().st_size for file in newest.path.iterdir())

    def close(self) -> None:
        """Let go of the run."""
        self.observer.close()


def _drawn(shape: Shape) -> tuple[tuple[Tensor, Tensor], nn.Module]:
    width = shape.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [module for _ in range(shape.layers) for module in (nn.Linear(width, width), nn.ReLU())]
        return (torch.rand(shape.batch_size, width), torch.rand(shape.batch_size, width)), nn.Sequential(*layers)


def _remove(paths: Iterable[Path]) -> None:
    """Remove files, and directories of files."""
    for path in list(paths):
        for file in path.iterdir() if path.is_dir() else (path,):
            file.read_bytes()
            file.unlink()
        if path.is_dir():
            path.rmdir()
    os.sync()


def _saving(both: Both, timed: Mapping[str, Timed], rounds: int) -> Table:
    base = timed[TORCH]
    by_hand, ours = both.sizes()
    return Table(
        title=f"Saving {ours / 1e6:.0f} MB, {rounds} rounds",
        notes=(
            f"An MLP with AdamW's slots; {by_hand / 1e6:.0f} MB by torch.save. Ours is hashed as well.",
            "Blocked: the observer's call, and what the next update waits for. A step beside a save shares cores and",
            "memory with copy, hash and writes. A wide range tells of cold memory: then compare the least, and CPU.",
        ),
        columns=("what", "wall s", "CPU s", "wall ratio"),
        lines=tuple(_line(timed[name], base) for name in (TORCH, BLOCKED, FIRST, WRITTEN, STEP, BESIDE)),
        reach=(
            Reach(BLOCKED, ratio(timed[BLOCKED].wall, base.wall), BLOCKED_LIMIT),
            Reach(WRITTEN, ratio(timed[WRITTEN].wall, base.wall), WRITTEN_LIMIT),
        ),
        results=tuple(part.as_json() for part in timed.values()),
    )


def _loading(both: Both, timed: Mapping[str, Timed], rounds: int) -> Table:
    base = timed[TORCH_LOAD]
    return Table(
        title=f"Loading {both.sizes()[1] / 1e6:.0f} MB, {rounds} rounds",
        notes=("From the disk's cache. Ours is compared with its hashes, and is a state that can be stepped.",),
        columns=("what", "wall s", "CPU s", "wall ratio"),
        lines=tuple(_line(timed[name], base) for name in (TORCH_LOAD, TORCH_RESTORE, RESTORE)),
        reach=(Reach(RESTORE, ratio(timed[RESTORE].wall, base.wall), LOADED_LIMIT),),
        results=tuple(part.as_json() for part in timed.values()),
    )


def _line(part: Timed, base: Timed) -> tuple[str, ...]:
    cpu = spread(part.cpu, 1.0) if part.cpu else ""
    return part.name, spread(part.wall, 1.0), cpu, f"{ratio(part.wall, base.wall):.3f}"


def _training(task: Task, directory: Path, rounds: int) -> Table:
    """Compare whole trainings; what is timed begins and ends just after a save, so that it holds whole intervals."""
    arms = (
        Arm("no saves", NO_DATA, lambda task, clock: _trained(task, clock)),
        Arm(SAVED, NO_DATA, lambda task, clock: _trained(task, clock, saved(tempfile.mkdtemp(dir=directory), keep=2))),
        Arm(TORCH, NO_DATA, lambda task, clock: _trained(task, clock, _torch_saved(directory / "state.pt"))),
    )
    results = interleaved(task, arms, rounds)
    base = results[0]
    return Table(
        title=f"Saving every {INTERVAL} steps: {task.size}, {rounds} rounds of {task.steps} steps",
        notes=("The share lost is that of the run without saves; the same losses are reached.",),
        columns=("saves", "wall ms a step", "CPU ms a step", "wall lost", "CPU lost"),
        lines=tuple(
            (
                result.arm.name,
                spread(result.wall, 1e-3),
                spread(result.cpu, 1e-3),
                f"{100 * (ratio(result.wall, base.wall) - 1):.1f} %",
                f"{100 * (ratio(result.cpu, base.cpu) - 1):.1f} %",
            )
            for result in results
        ),
        results=tuple(result.as_json() for result in results),
    )


def _trained(task: Task, clock: Clock, *savers: Observer | Observe) -> nn.Module:
    plan = ff.Plan(
        model=task.model(),
        loss=ff.losses.causal_lm,
        optimizer=ff.adamw(weight_decay=WEIGHT_DECAY),
        schedule=lambda step: PEAK * clock(step),
        transforms=(ff.clipped(MAX_NORM),),
    )
    program = ff.single(plan)
    ticks = program.steps(program.init(0), task.batches)
    return program.export(toolz.pipe(ticks, ff.every(INTERVAL, *savers), ff.until(steps=task.updates), ff.last))


def _torch_saved(path: Path) -> Observe:
    def observe(tick: ff.Tick, /) -> None:
        slots = {name: dict(slot) if isinstance(slot, Mapping) else slot for name, slot in tick.state.opt.items()}
        with path.open("wb") as file:
            torch.save({"params": dict(tick.state.params), "opt": slots, "step": tick.state.step}, file)
            file.flush()
            os.fsync(file.fileno())

    return observe
