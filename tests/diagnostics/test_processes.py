"""Several processes see the same inside a run as one does, and their run is as if nobody had looked."""

import functools
from pathlib import Path
from typing import Any

import pytest
import toolz
import torch
import torch.distributed.fsdp  # in the parent of all processes, since each would take seconds for it

import forgather_fn as ff
from forgather_fn import diagnostics
from forgather_fn.testing.processes import processes
from tests.toys import classifier, labelled, labelled_batches

STRATEGIES = {
    "single": ff.single,
    "replicated": ff.accelerated,
    "sharded": functools.partial(ff.accelerated, sharded=True),
    "pipelined": functools.partial(ff.pipelined, split_spec={"0": "end"}),
}


def plan() -> ff.Plan:
    return ff.Plan(
        model=functools.partial(classifier, torch.float64),
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(weight_decay=0.1),
        schedule=1e-2,
        microbatches=2,
    )


def watched(strategy: str, directory: str | None) -> dict[str, Any]:
    """Train with all that can be looked at, and say what was seen; without looks where there is no directory."""
    program = STRATEGIES[strategy](plan())
    seen: list[dict[str, float]] = []
    looks: list[Any] = []
    if directory is not None:
        observers = [diagnostics.module_norms(depth=1), diagnostics.histograms(directory)]
        if strategy != "pipelined":
            batch = labelled(6, seed=9, dtype=torch.float64)
            observers.append(diagnostics.activation_statistics(batch=batch))
        looks = [
            diagnostics.profiled(directory, start=2),
            ff.every(2, *observers, lambda tick: seen.append(dict(tick.results))),
        ]
    batches = labelled_batches(4, dtype=torch.float64)
    final = toolz.pipe(program.steps(program.init(seed=1), batches), *looks, ff.last)
    whole = program.whole(final)
    params = None if whole is None else {name: p.clone() for name, p in whole.params.items()}
    return {"seen": seen, "params": params}


@pytest.fixture(scope="module")
def two():
    with processes(2) as pool:
        yield pool


@pytest.mark.parametrize("strategy", ["replicated", "sharded", "pipelined"])
def test_two_processes_see_what_one_does(two: Any, strategy: str, tmp_path: Path) -> None:
    expected = watched("single", str(tmp_path / "one"))["seen"]
    found = two.run(watched, strategy, str(tmp_path / "two"))
    for one in found:
        for row, other in zip(one["seen"], expected, strict=True):
            assert set(row) == {name for name in other if strategy != "pipelined" or "activation" not in name}
            assert row == pytest.approx({name: other[name] for name in row}, rel=1e-9, abs=1e-12)
    for kept, plain in zip(found, two.run(watched, strategy, None), strict=True):
        assert (kept["params"] is None) == (plain["params"] is None)
        assert all(torch.equal(p, plain["params"][name]) for name, p in (kept["params"] or {}).items())
    traces = {path.name for path in (tmp_path / "two").glob("*.json")}
    assert traces == {f"steps-2-2.rank-{rank}.pt.trace.json" for rank in (0, 1)}
    assert len(list((tmp_path / "two" / "histograms").iterdir())) == 1  # of the first process


def used(strategy: str) -> list[float]:
    program, now, found = STRATEGIES[strategy](plan()), iter(range(9)), []
    looks = diagnostics.utilization(1.0, peak_flops=12.0, clock=lambda: next(now))
    note = ff.every(1, looks, lambda tick: found.append(tick.results.get("model_flops_utilization", 0.0)))
    toolz.pipe(program.steps(program.init(seed=1), labelled_batches(3, dtype=torch.float64)), note, ff.last)
    return found


def test_two_devices_can_do_twice_as_much(two: Any) -> None:
    assert used("single") == [0.0, 0.5, 0.5]
    assert two.run(used, "replicated") == [[0.0, 0.25, 0.25]] * 2


def refused(strategy: str) -> str:
    program = STRATEGIES[strategy](plan())
    state = program.init(seed=1)
    try:
        if strategy == "pipelined":
            diagnostics.activations(program, state, labelled(6, dtype=torch.float64))
        else:
            program.step(state, labelled(6, dtype=torch.float64), wants=frozenset({"gradients"}))
    except ValueError as error:
        assert not state.consumed
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [("sharded", "of which this process has a part only"), ("pipelined", "a stage of this model only")],
)
def test_what_no_process_has_is_refused(two: Any, strategy: str, message: str) -> None:
    assert all(message in told for told in two.run(refused, strategy))


def of_the_step(strategy: str) -> list[dict[str, float]]:
    """Look at the batch of each step, the last of which ends an epoch."""
    program, seen = STRATEGIES[strategy](plan()), []
    stream = ff.batches(labelled(7, dtype=torch.float64), batch_size=4, last="ragged", epochs=1)
    look = diagnostics.activation_statistics(modules="0")
    note = ff.every(1, look, lambda tick: seen.append(dict(tick.results)))
    toolz.pipe(program.steps(program.init(seed=1), stream), note, ff.last)
    return seen


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_the_batch_of_a_step_is_looked_at_in_the_microbatches_that_the_first_process_has(
    two: Any, strategy: str
) -> None:
    alone, whole = of_the_step("replicated"), of_the_step("single")
    for row, other in zip(alone, whole, strict=True):
        assert row == pytest.approx(other, rel=1e-12)
    first, second = two.run(of_the_step, strategy)
    assert first == second
    assert len(first) == 2
