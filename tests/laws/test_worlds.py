"""Law 5: 1, 2 and 4 processes give the same run."""

from typing import Any

import pytest
import toolz
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.testing import check_worlds
from forgather_fn.testing.processes import processes
from tests.ragged import plan_of, rows

SIZES = (1, 2, 4)


class Tokens(nn.Module):
    """A small language model with dropout, and a head that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11)
        self.rare = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        hidden = hidden + self.layer(hidden)
        return self.rare(hidden) if (ids[:, 0] == 0).all() else self.head(hidden)


class Graphed(Tokens):
    """The same, without a branch that a graph cannot have."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        return self.head(hidden + self.layer(hidden))


def plan(**changes: Any) -> ff.Plan:
    return plan_of(**{"model": Tokens} | changes)


def recorded(state: ff.TrainState, metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Take what a run has come to, to be compared to the bit."""
    arrays = state.read()
    opt = {f"opt/{name}": slot for name, slot in arrays.opt.items()}
    flats = {"params": arrays.params, "ema": arrays.ema, "buffers": arrays.buffers} | opt
    tensors = {
        f"{name}/{i}": buffer.clone()
        for name, flat in flats.items()
        if flat is not None
        for i, buffer in enumerate(getattr(flat, "buffers", [flat]))
    }
    return {"tensors": tensors, "metrics": metrics, "place": (state.step, state.samples, int(state.tokens))}


def trained(case: str, steps: int = 6) -> dict[str, Any]:
    """Train over batches of 10 out of 22 samples, the last of an epoch ragged: 10, 10, 2 samples for 8 microbatches."""
    given, changes, _ = CASES[case]
    program = ff.accelerated(plan(**changes), **given)
    data = ff.batches(rows(), batch_size=10, last="ragged")
    found = []
    state = program.init(seed=1)
    for tick in ff.until(steps=steps)(program.steps(state, data)):
        state = tick.state
        found.append({name: float(value) for name, value in tick.metrics.items()})
    found.append(program.evaluate(state, ff.batches(rows(7), batch_size=2)))
    return recorded(state, found)


def continued(run: str, begun: bool) -> dict[str, Any]:
    """Train for three steps and save, or go on from there for three more."""
    program = ff.accelerated(plan(), reduction="tree")
    data = ff.batches(rows(), batch_size=10, last="ragged")
    state = program.init(seed=1) if begun else program.restore(run)
    steps = program.steps(state, data)
    stages = (ff.every(2, ff.saved(run)), ff.until(steps=3 if begun else 6))
    return recorded(toolz.pipe(steps, *stages, ff.last), [])


def alone() -> dict[str, Any]:
    program = ff.single(plan())
    found, state = [], program.init(seed=1)
    for tick in ff.until(steps=6)(program.steps(state, ff.batches(rows(), batch_size=10, last="ragged"))):
        state = tick.state
        found.append({name: float(value) for name, value in tick.metrics.items()})
    found.append(program.evaluate(state, ff.batches(rows(7), batch_size=2)))
    return recorded(state, found)


@pytest.fixture(scope="module")
def pools():
    with processes(2) as two, processes(4) as four:
        yield {1: lambda function, *args: [function(*args)], 2: two.run, 4: four.run}


def leaves(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    metrics = {
        f"metrics/{i}/{name}": torch.tensor(value, dtype=torch.float64)
        for i, row in enumerate(run["metrics"])
        for name, value in row.items()
    }
    return run["tensors"] | metrics


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def unlike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> list[str]:
    """Name what differs: in any bit where the tolerance is 0."""
    mine, others = leaves(one), leaves(other)
    assert mine.keys() == others.keys()
    assert one["place"] == other["place"]
    if tolerance == 0.0:
        return [name for name, tensor in mine.items() if bits(tensor) != bits(others[name])]
    return [n for n, t in mine.items() if not torch.allclose(t, others[n], rtol=tolerance, atol=tolerance)]


SUM, TREE, PIECES = {"reduction": "sum"}, {"reduction": "tree"}, {"overlap_bytes": 0}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "sum in float64": (SUM, {}, 1e-12),
    "sum in pieces": (PIECES, {}, 1e-12),
    "tree in float64": (TREE, {}, 0.0),
    "tree in float32": (TREE, {"precision": "as_built"}, 0.0),
    "tree in bfloat16": (TREE, {"precision": "bfloat16"}, 0.0),
    "tree with noise": (
        TREE,
        {"transforms": (ff.noise(0.1), ff.clipped(1.0)), "optimizer": ff.sgd(momentum=0.9)},
        0.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_worlds_agree(pools, case):
    tolerance = CASES[case][2]
    (one,), *others = [run(trained, case) for run in pools.values()]
    for runs in others:
        for run in runs:
            assert unlike(one, run, tolerance) == []
            assert unlike(runs[0], run, 0.0) == []  # the processes of one world agree to the bit


def compiled() -> dict[str, Any]:
    changes = {"compile": True, "backend": "aot_eager", "model": Graphed, "microbatches": 4, "average": None}
    program = ff.accelerated(plan(**changes), reduction="tree")
    state = toolz.pipe(program.steps(program.init(1), ff.batches(rows(), batch_size=10)), ff.until(steps=2), ff.last)
    return recorded(state, [])


def test_compiled_worlds_agree(pools):
    one, two, other = (run for size in (1, 2) for run in pools[size](compiled))
    assert unlike(one, two, 0.0) == unlike(one, other, 0.0) == []


def test_one_process_of_many_is_a_single_device():
    assert unlike(alone(), trained("sum in float64"), 1e-12) == []
    assert unlike(alone(), trained("tree in float64"), 1e-12) == []


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (2, 4), (4, 2), (1, 2)])
def test_a_run_goes_on_in_another_world(pools, tmp_path, saved_by, resumed_by):
    whole = trained("tree in float64")
    run = str(tmp_path)
    pools[saved_by](continued, run, True)
    for found in pools[resumed_by](continued, run, False):
        assert unlike(whole | {"metrics": []}, found, 0.0) == []


def test_users_can_check_it():
    check_worlds(plan(precision="as_built"), ff.batches(rows(), batch_size=10, last="ragged"))


class Leaking(nn.Module):
    """A model whose noise comes from a generator of its own, so from how many microbatches its process has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) + 1e-3 * torch.rand(11, generator=self.generator)


class Ranked(nn.Module):
    """A model that looks at its rank."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return self.inner(ids) * (1 + 1e-9 * rank)


@pytest.mark.parametrize("model", [Leaking, Ranked])
def test_what_depends_on_the_process_is_found(model):
    with pytest.raises(AssertionError, match=r"worlds: with reduction=.* of 2 processes ends otherwise"):
        check_worlds(plan(model=model, average=None), ff.batches(rows(), batch_size=10), processes=[2])
