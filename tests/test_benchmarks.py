import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from benchmarks import compiled, models, startup
from benchmarks.__main__ import ROWS
from benchmarks.arms import ALONE, LOADED, PEERS_LOADED, installed, left_out
from benchmarks.loops import by_hand
from benchmarks.measure import Arm, Clock, check_losses, interleaved, ratio, spread
from benchmarks.memory import peak
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import PEAK, Task

ROOT = Path(__file__).parent.parent
TASK = Task(name="tiny", shape=models.SMALL, batch_size=4, warmup=2, steps=20)
HAND = ALONE[0]


def planted(train: Callable[[Task, Clock], nn.Module]) -> Arm:
    return Arm("planted", "no", train)


def test_rows_run_and_write_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "overhead", "memory", "import", "--quick", "--json", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    written = json.loads(path.read_text())
    assert f"torch {torch.__version__}" in written["versions"]
    loaded, alone, memory, estimated, vocabulary, started, trainers = written["tables"]
    assert {result["arm"] for result in loaded["results"]} >= {
        "hand-written",
        "forgather_fn",
        "forgather.ml.Trainer",
        "transformers.Trainer",
    }
    for table in (loaded, alone):
        losses = [loss for result in table["results"] for loss in result["losses"]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
        assert all(cpu > 0 for result in table["results"] for cpu in result["cpu"])
    assert all(result["bytes"] > 43_000 * 16 for result in memory["results"])  # weights, gradients and two slots
    assert all(abs(row["estimated"] / row["measured"] - 1) < 0.1 for row in estimated["results"])
    whole, chunked = (result["bytes"] for result in vocabulary["results"])
    assert chunked < whole
    assert len(started["results"]) == 3
    assert all(cpu > 0 for result in trainers["results"] for cpu in result["cpu"])


def test_the_other_rows_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "compiled", "everything", "control", "scaling", "gpu", "--quick"]
    ended = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    alone, everything, small, large, microbatches, layers, two, sizes, gpu = json.loads(path.read_text())["tables"]
    assert {result["arm"] for result in alone["results"]} >= {compiled.WHOLE, compiled.PART, compiled.MODEL_ONLY}
    for table in (alone, everything, small, large):
        losses = [loss for result in table["results"] for loss in result["losses"]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert [result["microbatches"] for result in microbatches["results"]] == [1, 8]
    assert [result["layers"] for result in layers["results"]] == [1, 12]
    assert [result["bytes"] for result in two["results"]] == [172_984]  # 2 (n - 1) / n of 43 k gradients, and a little
    assert [result["processes"] for result in sizes["results"]] == [1, 2]
    assert bool(gpu["results"]) == torch.cuda.is_available()


def test_the_data_row_runs() -> None:
    command = [sys.executable, "-m", "benchmarks", "data", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    for data in ("no: batches made before", "DataLoader, 2 workers", "in 1 thread", "in 2 threads", "in 2 workers"):
        assert data in ended.stdout


def test_an_unknown_row_is_named_by_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks", "speed"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert all(row in ended.stderr for row in (*ROWS, "all"))


def test_every_row_can_be_run() -> None:
    assert all(callable(importlib.import_module(module).run) for module in ROWS.values())


@pytest.mark.parametrize(
    ("task", "parameters", "tensors"), [(SMALL, 42_624, 30), (DEEP, 150_436, 150), (LARGE, 3_299_072, 54)]
)
def test_models_are_as_large_as_the_tables_say(task: Task, parameters: int, tensors: int) -> None:
    sizes = [p.numel() for p in task.model().parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)


def test_every_arm_gets_its_batches_in_the_task_s_order() -> None:
    first = next(iter(TASK.fetched()))["input_ids"]
    assert torch.equal(first, TASK.tokens[TASK.order[:4]])
    assert not torch.equal(first, TASK.tokens[:4])
    check_losses((arm, TASK.loss(arm.train(TASK, Clock(TASK)))) for arm in (*LOADED, *ALONE))


def repeating_a_batch(task: Task, clock: Clock) -> nn.Module:
    return by_hand(task, clock, [task.batches[0], *task.batches[:-1]])


def at_another_rate(task: Task, clock: Clock) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.task.PEAK", 1.001 * PEAK)
        return by_hand(task, clock, task.batches)


def without_clipping(task: Task, clock: Clock) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.loops.MAX_NORM", 1e9)
        return by_hand(task, clock, task.batches)


def without_decay(task: Task, clock: Clock) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.task.WEIGHT_DECAY", 0.0)
        return by_hand(task, clock, task.batches)


@pytest.mark.parametrize("wrong", [repeating_a_batch, at_another_rate, without_clipping, without_decay])
def test_an_arm_that_does_something_else_is_refused(wrong: Callable[[Task, Clock], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"planted .* ended at the loss .* they did not do the same"):
        interleaved(TASK, [HAND, planted(wrong)], rounds=1)


def test_an_arm_that_ends_early_is_refused() -> None:
    early = planted(lambda task, clock: by_hand(task, clock, task.batches[:-2]))
    with pytest.raises(ValueError, match="planted: the schedule was not called at every step"):
        interleaved(TASK, [HAND, early], rounds=1)


def test_arms_take_turns_and_each_comes_first_once() -> None:
    seen: list[str] = []

    def recorded(name: str) -> Arm:
        def train(task: Task, clock: Clock) -> nn.Module:
            seen.append(name)
            clock(task.warmup)
            clock(task.warmup + task.steps)
            return task.model()

        return Arm(name, "no", train)

    results = interleaved(TASK, [recorded(name) for name in "abc"], rounds=3)
    assert "".join(seen) == "abcbcacab"
    assert all(len(result.cpu) == len(result.wall) == len(result.losses) == 3 for result in results)


def test_peak_memory_is_exact_to_the_byte() -> None:
    def holding(task: Task, clock: Clock) -> nn.Module:
        held = torch.zeros(1000)
        model = HAND.train(task, clock)
        del held
        return model

    task = attrs.evolve(TASK, steps=2)
    assert peak(planted(holding), task)[0] - peak(HAND, task)[0] == 4000


def test_statistics_are_of_medians() -> None:
    assert ratio([1.0, 2.0, 90.0], [4.0, 4.0, 1.0]) == 0.5
    assert spread([0.004, 0.001, 0.002], 1e-3) == "2.000 (1.000 to 4.000)"


def test_a_table_says_which_goals_were_missed() -> None:
    table = Table(
        title="T", columns=("a", "long"), lines=(("1", "2"),), reach=(Reach("x", 0.5, 0.5), Reach("y", 0.6, 0.5))
    )
    assert "| a | long |\n| - | ---- |\n| 1 | 2    |" in table.text()
    assert table.text().endswith("x: 0.500, to be at most 0.5: reached\ny: 0.600, to be at most 0.5: MISSED\n")


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.arms.find_spec", lambda package: None if package == "lightning" else package)
    assert [arm.name for arm in installed(PEERS_LOADED)] == ["Accelerate", "transformers.Trainer"]
    assert left_out() == ("Left out, because not installed: Lightning Fabric, Lightning Trainer.",)


def test_an_import_that_fails_has_no_time() -> None:
    with pytest.raises(ValueError, match=r"(?s)import not_there failed: .*No module named 'not_there'"):
        startup.cpu_seconds("import not_there")
