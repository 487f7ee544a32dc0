"""AccelTrainer on 1, 2 and 4 processes: the same run, to the last bit where pairs are added."""

import os
from pathlib import Path

import pytest
import torch

import forgather.ml as ml
from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.testing.processes import ProcessesFailed, processes
from tests.compat import accel
from tests.compat.tiny import double


class Here:
    """This process, as a pool of one."""

    def run(self, function, *args):
        return [function(*args)]


@pytest.fixture(scope="module")
def pools():
    with processes(2) as two, processes(4) as four:
        yield {1: Here(), 2: two, 4: four}


def failed(pool, function, *args):
    """Let a function fail on all processes of a pool, and give what each says, by rank."""
    with pytest.raises(ProcessesFailed) as caught:
        pool.run(function, *args)
    return [caught.value.errors[rank] for rank in range(pool.size)]


def leaves(run):
    logs = {
        f"log {i} {name}": torch.tensor(value, dtype=torch.float64)
        for i, row in enumerate(run["logs"])
        for name, value in row.items()
    }
    return logs | {part: run[part] for part in ("predictions", "labels")} | run["tensors"]


def unlike(one, other, tolerance):
    """Name what differs: in any bit where the tolerance is 0."""
    assert one["place"] == other["place"]
    assert [row.keys() for row in one["logs"]] == [row.keys() for row in other["logs"]]
    mine, others = leaves(one), leaves(other)
    assert mine.keys() == others.keys()
    if tolerance == 0.0:
        return [n for n, tensor in mine.items() if not torch.equal(tensor, others[n])]
    return [n for n, t in mine.items() if not torch.allclose(t, others[n], rtol=tolerance, atol=tolerance)]


@pytest.mark.parametrize("case", accel.CASES)
def test_worlds_agree(pools, tmp_path, case):
    tolerance = accel.CASES[case].get("tolerance", 0.0 if accel.CASES[case].get("reduction") == "tree" else 1e-12)
    (one,) = pools[1].run(accel.trained, case, 1, str(tmp_path / "1"))
    assert one["flags"] == (True, 1, 0)
    assert len(one["predictions"]) in (10, 13)
    for size in (2, 4):
        runs = pools[size].run(accel.trained, case, size, str(tmp_path / str(size)))
        for rank, found in enumerate(runs):
            assert found["flags"] == (rank == 0, size, rank)
            assert unlike(one, found, tolerance) == []
            assert unlike(runs[0], found, 0.0) == []  # the processes of one world agree to the bit


@pytest.mark.parametrize("case", ["a language model", "in float32", "an override of the step", "a loss function"])
def test_one_process_gives_the_numbers_of_the_trainer(tmp_path, case, monkeypatch):
    mine = accel.trained(case, 1, str(tmp_path))
    given = {**accel.CASES[case], "cls": ml.Trainer}
    given.pop("reduction", None)
    monkeypatch.setitem(accel.CASES, case, given)
    kind = accel.ml.AccelTrainingArguments
    monkeypatch.setattr(accel.ml, "AccelTrainingArguments", ml.TrainingArguments)
    theirs = accel.trained(case, 1, str(tmp_path))
    monkeypatch.setattr(accel.ml, "AccelTrainingArguments", kind)
    assert unlike(theirs, mine, 1e-12 if "single" not in given else 1e-6) == []


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (2, 4), (4, 2), (1, 2)])
def test_a_run_goes_on_in_another_world(pools, tmp_path, saved_by, resumed_by):
    whole = accel.trained("in pairs", 1, str(tmp_path / "whole"))
    folder = str(tmp_path / "run")
    begun = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    pools[saved_by].run(accel.trained, "in pairs", saved_by, folder, begun)
    for name in ("checkpoint-6", "checkpoint-7"):
        if (Path(folder) / name).exists():
            (Path(folder) / name).rename(tmp_path / name)
    for found in pools[resumed_by].run(accel.resumed, "in pairs", resumed_by, folder):
        assert unlike(whole, found, 0.0) == ["log 7 train_loss"]  # the mean of those that this call made


@pytest.mark.parametrize("case", ["lines", "samples that draw", "a look between"])
def test_any_run_goes_on_in_another_world(pools, tmp_path, case):
    whole = accel.trained(case, 1, str(tmp_path / "whole"))
    folder = str(tmp_path / "run")
    pools[2].run(accel.trained, case, 2, folder, {"save_strategy": "steps", "save_steps": 4})
    (Path(folder) / "checkpoint-7").rename(tmp_path / "checkpoint-7")
    for found in pools[4].run(accel.resumed, case, 4, folder):
        different = unlike(whole, found, 1e-12)
        assert [name for name in different if not name.endswith("train_loss")] == []


@pytest.mark.parametrize("size", [1, 4])
def test_the_microbatches_of_a_step_are_kept_where_the_world_changes(pools, tmp_path, size, caplog):
    constant = {"lr_scheduler_type": "constant"}
    first = {**constant, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    pools[2].run(accel.trained, "in pairs", 2, str(tmp_path), first)
    whole = accel.trained("in pairs", 1, str(tmp_path / "whole"), constant)
    as_it_was = {**constant, "gradient_accumulation_steps": 2}  # of 2 processes
    for found in pools[size].run(accel.resumed, "in pairs", size, str(tmp_path), as_it_was):
        assert found["place"][:2] == whole["place"][:2]
        assert all(torch.equal(tensor, whole["tensors"][name]) for name, tensor in found["tensors"].items())
    if size == 1:
        assert "The steps stay as they were: gradient_accumulation_steps=4 is used" in caplog.text


def test_another_batch_is_refused_unless_it_is_meant(pools, tmp_path):
    folder, options = str(tmp_path), {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    three = {**options, "gradient_accumulation_steps": 3}
    accel.trained("in float32", 1, folder, three)
    for text in failed(pools[2], accel.resumed, "in float32", 2, folder, {"max_steps": 4}):
        assert "steps of 3 microbatches of 3 samples" in text
        assert "cannot be shared out evenly among 2 processes" in text
    with pytest.raises(ValueError, match="Go on with per_device_train_batch_size=3"):
        accel.resumed("in float32", 1, folder, {"max_steps": 4, "per_device_train_batch_size": 5})
    meant = {"max_steps": 4, "allow_batch_change": True, "per_device_train_batch_size": 5}
    assert accel.resumed("in float32", 1, folder, meant)["place"][0] == 4


@pytest.mark.parametrize("cls", [ml.AccelTrainer, accel.Doubled])
def test_running_statistics_are_those_of_the_first_process(pools, tmp_path, cls):
    one, other = pools[2].run(accel.normed, str(tmp_path), cls)
    assert float(one["norm.running_mean"].abs().sum()) > 0
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_the_first_process_asks_for_is_done_on_all(pools, tmp_path):
    for found in pools[2].run(accel.asked, str(tmp_path)):
        assert found["place"][0] == 5
        evaluated, logged = ([row["step"] for row in found["logs"] if name in row] for name in ("eval_loss", "loss"))
        assert evaluated == [2]
        assert [row["eval_rank"] for row in found["logs"] if "eval_rank" in row] == [0]
        assert logged == [3]


def test_what_is_commanded_from_outside_is_done_on_all(pools, tmp_path):
    found = pools[2].run(accel.commanded, str(tmp_path))
    (steps,) = {run["place"][0] for run in found}
    assert 60 < steps < 2000
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [steps]
    evaluated = [[row["step"] for row in run["logs"] if "eval_loss" in row] for run in found]
    assert evaluated[0] == evaluated[1]
    assert 2 <= evaluated[0][0] < steps


def test_a_loss_that_is_not_finite_on_one_process_stops_all(pools, tmp_path):
    assert pools[2].run(accel.diverged, str(tmp_path)) == [3, 3]
    assert pools[2].run(accel.diverged, str(tmp_path)) == [3, 3]  # they have agreed on it, and go on


def test_a_look_by_one_process_is_a_look_on_all(pools, tmp_path):
    whole = accel.trained("a language model", 1, str(tmp_path))
    one, other = pools[2].run(accel.looked_at_by_one, str(tmp_path))
    assert (one["looked"], other["looked"]) == (0, 5)
    assert unlike(whole, one, 1e-12) == []
    assert unlike(one, other, 0.0) == []


def test_a_signal_to_one_process_ends_all_after_the_same_step(pools, tmp_path):
    (steps, others) = pools[2].run(accel.signalled, str(tmp_path))
    assert steps == others
    assert steps in (3, 4)
    assert os.listdir(tmp_path) == [f"checkpoint-{steps}"]


def test_files_and_words_are_those_of_the_first_process(pools, tmp_path):
    (first, second) = pools[2].run(accel.noisy, str(tmp_path))
    assert "train_loss" in first[0]
    assert "it/s" in first[1]
    assert second == ("", "")
    files = sorted(os.listdir(tmp_path))
    assert [name for name in files if name.startswith("checkpoint")] == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert all(entry.whole for entry in list_checkpoints(tmp_path))
    assert len(list(tmp_path.rglob("events.*"))) == 1
    for name in ("model.safetensors", "trainer_state.json", "train_results.json"):
        assert name in files


def test_a_save_that_fails_fails_on_all(pools, tmp_path):
    first, second = failed(pools[2], accel.not_saved, str(tmp_path))
    assert "FullError: no space left" in first
    assert "PeerError: rank 0 failed: FullError: no space left" in second
    assert "at step 6" in second
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def test_the_trainer_for_one_process_refuses_several(pools, tmp_path):
    for text in failed(pools[2], accel.plainly_refused, str(tmp_path)):
        assert "a launcher started 2 processes, and Trainer trains on 1" in text
        assert "use AccelTrainer with AccelTrainingArguments" in text
        assert "start one process" in text


def test_what_cannot_be_right_is_refused(pools, tmp_path):
    folder = str(tmp_path)
    for text in failed(pools[2], accel.trained, "in pairs", 2, folder, {"cls": accel.Doubled}):
        assert 'use reduction="sum"' in text
    for text in failed(pools[2], accel.trained, "in float32", 2, folder, {"auto_find_batch_size": True}):
        assert "where memory runs out on one" in text
    for text in failed(pools[2], accel.trained, "in float32", 2, folder, {"cls": accel.Split}):
        assert "the loader has a DistributedSampler" in text


def test_processes_that_were_given_other_things_are_refused(pools, tmp_path):
    first, second = failed(pools[2], accel.other_arguments, str(tmp_path))
    assert "rank 0 and rank 1 were given other arguments, seed=0 and 1" in first
    assert "rank 1 and rank 0 were given other arguments, seed=1 and 0" in second
    for text in failed(pools[2], accel.other_data, str(tmp_path)):
        assert "the processes have other data:\n  rank 0: Lengths(" in text
        assert "the trainer shares it out" in text


def test_the_first_process_goes_first(pools, tmp_path):
    assert pools[2].run(accel.in_turn, str(tmp_path)) == [(True, []), (False, ["cache"])]


def test_models_are_those_of_the_first_process(pools, tmp_path):
    (one,) = pools[1].run(accel.other_models, str(tmp_path))
    for weight, loss in pools[4].run(accel.other_models, str(tmp_path)):
        assert torch.equal(weight, one[0])
        torch.testing.assert_close(loss, one[1])


def test_an_accelerator_on_another_device_is_refused(tmp_path):
    class Elsewhere:
        device = torch.device("meta")
        num_processes = 1
        mixed_precision = "no"
        local_process_index = 0

    args = ml.AccelTrainingArguments(str(tmp_path), **accel.QUIET)
    with pytest.raises(ValueError, match="Accelerate computes on meta, and the arguments on cpu"):
        ml.AccelTrainer(model=torch.nn.Linear(1, 1), args=args, accelerator=Elsewhere())
    args.accelerator_args = {"cpu": True}
    with double(), pytest.raises(ValueError, match="were both given"):
        ml.AccelTrainer(model=torch.nn.Linear(1, 1), args=args, accelerator=Elsewhere())
