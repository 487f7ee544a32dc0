"""The ``resume`` row: the way from a start to the first batch, far into a stream, against skipping what came before."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import toolz
import torch
from accelerate import skip_first_batches
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import forgather_fn as ff
from benchmarks.measure import ratio, spread
from benchmarks.table import Reach, Table
from benchmarks.turns import Spent, Timed, in_turns, timing
from forgather_fn.checkpoint import save

SAMPLES: Final = 10**7
ITERATED: Final = 10**6
"""Where every batch that came before is made and thrown away, which takes seconds here, and ten times as long there."""

BATCH_SIZE: Final = 32
ROUNDS: Final = 5
LIMIT: Final = 0.05

MADE: Final = "DataLoader, itertools.islice: batches made and thrown away"
SKIPPED: Final = "DataLoader, accelerate.skip_first_batches: indices thrown away"
SAME: Final = 'batches(order="torch"): the same samples'
OURS: Final = "batches()"

WHOLE_SKIPPED: Final = "torch.load, accelerate.skip_first_batches"
WHOLE_OURS: Final = "program.restore, program.steps"


def run(quick: bool) -> Iterator[Table]:
    """Measure the stream alone at two sizes, then the whole way from a checkpoint."""
    samples, iterated, rounds = (20_000, 5_000, 1) if quick else (SAMPLES, ITERATED, ROUNDS)
    yield _first_batch(Task(samples=iterated), (MADE, SKIPPED, SAME, OURS), rounds)
    yield _first_batch(Task(samples=samples), (SKIPPED, SAME, OURS), rounds)
    yield _first_step(Task(samples=samples), rounds)


@attrs.frozen(kw_only=True, slots=False)
class Task:
    """A shuffled pass over a dataset that was left at nine tenths.

    Attributes:
        samples: In the dataset.
        columns: Its inputs, float32 ``[samples, 4]``, and targets ``[samples, 1]``.
    """

    samples: int
    columns: tuple[Tensor, Tensor] = attrs.field(init=False)

    @columns.default
    def _draw(self) -> tuple[Tensor, Tensor]:
        inputs = torch.rand(self.samples, 4, generator=torch.Generator().manual_seed(0))
        return inputs, inputs.sum(dim=1, keepdim=True)

    @property
    def batches_before(self) -> int:
        """Count the batches that came before."""
        return self.samples * 9 // 10 // BATCH_SIZE

    @property
    def position(self) -> int:
        """Count the samples that came before."""
        return self.batches_before * BATCH_SIZE

    def loader(self, seed: int) -> DataLoader[Any]:
        """Make torch's loader as people write it."""
        dataset = TensorDataset(*self.columns)
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
        return DataLoader(dataset, batch_size=BATCH_SIZE, sampler=sampler)

    def made(self, seed: int) -> Any:
        """Make every batch that came before, and give the next."""
        return next(itertools.islice(self.loader(seed), self.batches_before, None))

    def skipped(self, seed: int) -> Any:
        """Leave out the batches that came before, index by index, and give the next."""
        return next(iter(skip_first_batches(self.loader(seed), self.batches_before)))

    def same(self, seed: int) -> Any:
        """Start this library's stream, in the order of torch's sampler."""
        return self._started(ff.batches(self.columns, batch_size=BATCH_SIZE, order="torch"), seed)

    def ours(self, seed: int) -> Any:
        """Start this library's stream, in its own order."""
        return self._started(self.stream(), seed)

    def stream(self) -> ff.Stream:
        """Describe this library's stream."""
        return ff.batches(self.columns, batch_size=BATCH_SIZE)

    def _started(self, stream: ff.Stream, seed: int) -> Any:
        batches = stream.start(seed, self.position)
        try:
            return next(batches).data
        finally:
            batches.close()

    def expected(self, seed: int) -> Tensor:
        """Look up the inputs of the batch that all arms in torch's order must give."""
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        return self.columns[0][order[self.position : self.position + BATCH_SIZE]]


def _first_batch(task: Task, names: Sequence[str], rounds: int) -> Table:
    starts: dict[str, Callable[[int], Any]] = {
        MADE: task.made,
        SKIPPED: task.skipped,
        SAME: task.same,
        OURS: task.ours,
    }
    seeds = itertools.count()  # each round of each arm has its own, so that nothing is kept from one to the next

    def arm(name: str) -> dict[str, Spent]:
        seed = next(seeds)
        with timing() as spent:
            inputs, _ = starts[name](seed)
        if name != OURS and not torch.equal(inputs, task.expected(seed)):
            raise ValueError(f"{name}: the first batch is not the one that comes next, so its time says nothing")
        return {name: spent}

    timed = in_turns([lambda name=name: arm(name) for name in names], rounds)  # type: ignore[misc]
    left_out = () if MADE in names else ("Left out: to make the batches that came before, and throw them away.",)
    return _table(
        f"The first batch at 90 % of {task.samples:,} samples",
        ("Without a checkpoint: a start of the data alone, shuffled, in this process.", *left_out),
        [timed[name] for name in names],
    )


def _first_step(task: Task, rounds: int) -> Table:
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = Ours(task, Path(directory) / "run"), ByHand(task, Path(directory) / "state.pt")
        timed = in_turns([lambda: {WHOLE_SKIPPED: theirs()}, lambda: {WHOLE_OURS: ours()}], rounds)
    return _table(
        f"From a checkpoint to the end of the first step, at 90 % of {task.samples:,} samples",
        ("A model of 4.5 thousand parameters; the checkpoint is in the disk's cache.",),
        [timed[WHOLE_SKIPPED], timed[WHOLE_OURS]],
    )


class Ours:
    """A run of this library that was left at the task's position."""

    def __init__(self, task: Task, run: Path) -> None:
        self.run, self.stream, self.step = run, task.stream(), task.batches_before
        plan = ff.Plan(model=_model(), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=1e-3)
        self.program = ff.single(plan)
        state = attrs.evolve(self.program.init(0), step=self.step, samples=task.position)
        save(self.program, self.program.steps(state, self.stream).state, run)

    def __call__(self) -> Spent:
        with timing() as spent:
            state = self.program.restore(self.run)
            final = toolz.pipe(self.program.steps(state, self.stream), ff.until(steps=self.step + 1), ff.last)
        assert final.step == self.step + 1
        return spent


class ByHand:
    """The same, as it is written by hand."""

    def __init__(self, task: Task, path: Path) -> None:
        self.task, self.path = task, path
        self.model = _model()
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.update(*(column[:BATCH_SIZE] for column in task.columns))
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        nn.functional.mse_loss(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> Spent:
        with timing() as spent:
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.update(*self.task.skipped(0))
        return spent


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def _table(title: str, notes: tuple[str, ...], parts: Sequence[Timed]) -> Table:
    base, ours = parts[0], parts[-1]
    return Table(
        title=f"{title}, {len(base.wall)} rounds",
        notes=notes,
        columns=("start", "wall ms", "ratio"),
        lines=tuple((part.name, spread(part.wall, 1e-3), f"{ratio(part.wall, base.wall):.4f}") for part in parts),
        reach=(Reach(f"{ours.name}, wall time", statistics.median(ours.wall) / statistics.median(base.wall), LIMIT),),
        results=tuple(part.as_json() for part in parts),
    )
