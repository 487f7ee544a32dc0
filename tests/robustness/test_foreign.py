"""Checkpoints as transformers writes them, of which any file holds anything: gone on from, or refused by name."""

import json
import logging
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from forgather.ml import Trainer, TrainingArguments
from forgather.ml.trainer.trainer_types import TrainerState
from forgather.ml.trainer.unharmed import newest_checkpoint
from forgather_fn.checkpoint import CheckpointError, foreign, latest, list_checkpoints
from tests.compat.tiny import Regression
from tests.robustness.inputs import as_bytes, budget, changed, holds, mutated, values

STATE, INDEX, SAFE = "trainer_state.json", "model.safetensors.index.json", "model.safetensors"
PICKLED = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    caplog.set_level(logging.CRITICAL)


def trainer(place, steps):
    torch.manual_seed(0)
    data = [{"x": torch.ones(3) * i, "labels": torch.tensor(float(i))} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(place), max_steps=steps, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    return Trainer(model=Regression(), args=arguments, train_dataset=data)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """What transformers' own trainer leaves: the files of this one, without the commit."""
    place = tmp_path_factory.mktemp("run")
    trainer(place, 2).train()
    home = place / "checkpoint-2"
    for name in ("manifest.json", "state.json"):
        (home / name).unlink(missing_ok=True)
    return home


@pytest.fixture
def home(original, tmp_path):
    """A copy, which a test may write anything into."""
    return Path(shutil.copytree(original, tmp_path / "run" / "checkpoint-2"))


def gone_on(home):
    """Go on from a checkpoint; give the error that says why it cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(home.parent.parent / "out", 3).train(resume_from_checkpoint=str(home))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def test_the_original_is_gone_on_from(home):
    assert {STATE, SAFE, *PICKLED} <= set(os.listdir(home))
    assert gone_on(home) is None


@pytest.mark.parametrize("name", [*PICKLED, SAFE, STATE])
@budget(8)
def test_a_file_of_changed_bytes_is_read_or_refused(home, name, examples):
    content = (home / name).read_bytes()

    def check(data):
        (home / name).write_bytes(data)
        reason = gone_on(home)
        assert reason is None or str(home.name) in reason or name in reason

    holds(check, mutated(content), examples)


@budget(25)
def test_a_state_of_other_fields_is_read_or_refused(home, examples):
    path = home / STATE
    record = json.loads(path.read_bytes())

    def check(other):
        path.write_bytes(as_bytes(other))
        try:
            state = TrainerState.load_from_json(path)
        except CheckpointError as error:
            reason = str(error)
            assert str(path) in reason
            assert len(reason) < 2000
        else:
            assert state.global_step is None or state.global_step >= 0
        list_checkpoints(home.parent)

    holds(check, changed(record) | values, examples)


@budget(25)
def test_an_index_of_anything_names_files_of_its_directory_or_is_refused(home, examples):
    path = home / INDEX
    record = {"metadata": {"total_size": 3}, "weight_map": {"hidden.weight": SAFE, "out.bias": SAFE}}

    def check(other):
        path.write_bytes(as_bytes(other))
        try:
            names = foreign.files_of(path)
        except CheckpointError as error:
            names, reason = [], str(error)
        else:
            reason = str(path)
        assert str(path) in reason
        assert all(os.path.dirname(name) == "" and name not in ("", ".", "..") for name in names)
        list_checkpoints(home.parent)

    holds(check, changed(record) | values, examples)


@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", "", "a\0b"], ids=repr)
def test_an_index_does_not_lead_out_of_its_directory(home, index, name):
    shutil.copy(home / SAFE, home.parent / "secret.safetensors")
    (home / SAFE).unlink()
    (home / index).write_text(json.dumps({"weight_map": {"hidden.weight": name}}))
    reason = gone_on(home)
    assert reason is not None
    assert "is not the name of a file in its directory" in reason


class Attack:
    """What runs code when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", [*PICKLED, "pytorch_model.bin"])
def test_nothing_in_a_file_is_called(home, tmp_path, name):
    torch.save({"state": Attack(tmp_path / "called"), "python": Attack(tmp_path / "called")}, home / name)
    (home / "training_args.bin").write_bytes(pickle.dumps(Attack(tmp_path / "called")))
    if name == "pytorch_model.bin":
        (home / SAFE).unlink()
    assert f"{name} cannot be read" in (gone_on(home) or "")
    assert not (tmp_path / "called").exists()


ODD = {
    "a list": [1, 2],
    "a number": 3,
    "nothing": {},
    "other names": {"a": torch.ones(2)},
    "other shapes": {"hidden.weight": torch.ones(7), "state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": []},
    "a generator of another kind": {"python": (3, (1, 2), None), "numpy": 3, "cpu": torch.ones(3)},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", [*PICKLED, "pytorch_model.bin"])
def test_a_file_of_something_else_is_read_or_refused(home, name, odd):
    torch.save(ODD[odd], home / name)
    if name == "pytorch_model.bin":
        (home / SAFE).unlink()
    reason = gone_on(home)
    assert reason is None or name in reason or "hidden.weight" in reason
    if name == "rng_state.pth":
        assert reason is not None


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [*PICKLED, SAFE, STATE])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(home, name):
    (home / name).unlink()
    os.mkfifo(home / name)
    gone_on(home)
    newest_checkpoint(home.parent)


def test_a_file_that_is_too_large_is_not_read(home, monkeypatch):
    monkeypatch.setattr(foreign, "LIMIT", 100)
    assert "more than the 100 that are read" in (gone_on(home) or "")
    assert latest(home.parent) is None


@pytest.mark.parametrize("states", [[1], [None], "text", 3, [[]]], ids=repr)
def test_states_of_callbacks_that_are_none_are_refused(home, states):
    record = json.loads((home / STATE).read_bytes())
    for field in ("stateful_callbacks", "log_history"):
        (home / STATE).write_text(json.dumps(record | {field: states}))
        with pytest.raises(CheckpointError, match="expected a list of logs, the states of callbacks by name"):
            TrainerState.load_from_json(home / STATE)


def test_callbacks_of_which_none_can_be_made_are_refused(home):
    record = json.loads((home / STATE).read_bytes())
    for state in (3, {"args": 3}, {"args": {"no": 1}}, {"attributes": [1]}, [3]):
        (home / STATE).write_text(json.dumps(record | {"stateful_callbacks": {"TrainerControl": state}}))
        made = trainer(home.parent.parent / "out", 2)
        made.args.restore_callback_states_from_checkpoint = True
        with pytest.raises(CheckpointError, match="of which no TrainerControl can be made"):
            made.train(resume_from_checkpoint=str(home))
