"""State, control, enumerations and output tuples against transformers' own."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import trainer_callback, trainer_utils, training_args

from forgather.ml.trainer import enums, trainer_types
from forgather.ml.trainer.callbacks import EarlyStoppingCallback, TrainerControl, TrainerState
from forgather.ml.trainer.trainer_types import EvalPrediction, get_last_checkpoint, speed_metrics

ENUMS = {
    "IntervalStrategy": trainer_utils,
    "SaveStrategy": trainer_utils,
    "HubStrategy": trainer_utils,
    "SchedulerType": trainer_utils,
    "FSDPOption": trainer_utils,
    "HPSearchBackend": trainer_utils,
    "OptimizerNames": training_args,
    "ParallelMode": training_args,
    "DebugOption": transformers.debug_utils,
}


@pytest.mark.parametrize(("name", "module"), ENUMS.items(), ids=list(ENUMS))
def test_enumerations_have_the_members_of_transformers(name: str, module: Any) -> None:
    ours, theirs = getattr(enums, name), getattr(module, name)
    assert {one.name: one.value for one in ours} == {one.name: one.value for one in theirs}
    if name != "ParallelMode":
        assert str(ours(next(iter(theirs)).value)) == str(next(iter(theirs)))
        assert ours(next(iter(theirs))) == next(iter(theirs))  # their callbacks compare with their own
        with pytest.raises(ValueError, match=f"never is not a valid {name}, please select one of"):
            ours("never")


def fields(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def test_state_and_control_have_the_fields_and_defaults_of_transformers() -> None:
    assert fields(TrainerState) == fields(trainer_callback.TrainerState)
    assert dataclasses.asdict(TrainerState()) == dataclasses.asdict(trainer_callback.TrainerState())
    assert fields(TrainerControl) == fields(trainer_callback.TrainerControl)


def test_a_state_file_is_the_same_under_both_and_read_by_both(tmp_path: Path) -> None:
    callbacks = [EarlyStoppingCallback(2), EarlyStoppingCallback(3, 0.5), TrainerControl(should_save=True)]
    values: dict[str, Any] = {"epoch": 1.5, "global_step": 7, "log_history": [{"loss": 1.0, "step": 7}]}
    ours = TrainerState(**values, stateful_callbacks=callbacks)  # type: ignore[arg-type]  # they are exported
    theirs = trainer_callback.TrainerState(
        **values,
        stateful_callbacks=[
            transformers.EarlyStoppingCallback(2),
            transformers.EarlyStoppingCallback(3, 0.5),
            trainer_callback.TrainerControl(should_save=True),
        ],
    )
    ours.save_to_json(tmp_path / "ours.json")
    theirs.save_to_json(str(tmp_path / "theirs.json"))
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "theirs.json").read_text()
    assert TrainerState.load_from_json(tmp_path / "theirs.json") == ours
    assert trainer_callback.TrainerState.load_from_json(str(tmp_path / "ours.json")) == theirs


def test_a_callback_without_a_state_cannot_be_exported() -> None:
    with pytest.raises(TypeError, match="must inherit `ExportableState`, but received"):
        TrainerState(stateful_callbacks=[object()])  # type: ignore[arg-type]  # refused


def test_an_exported_callback_comes_back() -> None:
    callback = EarlyStoppingCallback(4, 0.5)
    callback.early_stopping_patience_counter = 3
    again = EarlyStoppingCallback.from_state(json.loads(json.dumps(callback.state())))
    assert vars(again) == vars(callback)


@pytest.mark.parametrize("steps", [(0.1, 0.25, 0.3), (5, None, 7), (0.1, 3, 0.01)])
def test_shares_become_numbers_of_steps_as_there(steps: tuple[float | None, ...]) -> None:
    class Given:
        logging_steps, eval_steps, save_steps = steps

    ours, theirs = TrainerState(), trainer_callback.TrainerState()
    ours.compute_steps(Given, 37)
    theirs.compute_steps(Given, 37)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)


def test_a_state_takes_what_a_trainer_knows() -> None:
    class Trainer:
        def is_local_process_zero(self) -> bool:
            return True

        def is_world_process_zero(self) -> bool:
            return False

    state = TrainerState()
    state.init_training_references(Trainer(), 9, 3, None)
    assert (state.max_steps, state.num_train_epochs) == (9, 3)
    assert (state.is_local_process_zero, state.is_world_process_zero) == (True, False)


@pytest.mark.parametrize("more", [{}, {"inputs": np.ones(2)}, {"inputs": np.ones(2), "losses": np.zeros(2)}])
def test_a_prediction_unpacks_and_is_indexed(more: dict[str, Any]) -> None:
    ours = EvalPrediction(np.arange(2), np.arange(3), **more)
    theirs = trainer_utils.EvalPrediction(np.arange(2), np.arange(3), **more)
    assert [one.tolist() for one in ours] == [one.tolist() for one in theirs]
    assert ours[1].tolist() == [0, 1, 2]
    for index in (-1, 2 + len(more)):
        with pytest.raises(IndexError):
            ours[index]


@pytest.mark.parametrize("name", ["EvalLoopOutput", "PredictionOutput", "TrainOutput", "BestRun"])
def test_output_tuples_have_the_fields_of_transformers(name: str) -> None:
    ours, theirs = getattr(trainer_types, name), getattr(trainer_utils, name)
    assert ours._fields == theirs._fields
    assert ours._field_defaults == theirs._field_defaults


def test_speed_is_measured_under_the_names_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 103.0)
    for counts in ({}, {"num_samples": 30}, {"num_samples": 31, "num_steps": 4, "num_tokens": 77}):
        assert speed_metrics("eval", 100.0, **counts) == trainer_utils.speed_metrics("eval", 100.0, **counts)
    assert speed_metrics("eval", 103.0, 5) == {"eval_runtime": 0.0}


def checkpoint(run: Path, step: int) -> Path:
    """What transformers writes of a tiny model, as far as it is looked at."""
    from safetensors.numpy import save_file

    path = run / f"checkpoint-{step}"
    path.mkdir()
    save_file({"weight": np.ones(2, dtype=np.float32)}, path / "model.safetensors")
    TrainerState(global_step=step).save_to_json(path / "trainer_state.json")
    os.utime(path, (step, step))
    return path


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert get_last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-99").mkdir()  # a save that was killed, which transformers chooses
    (checkpoint(tmp_path, 11) / "trainer_state.json").unlink()
    cut = checkpoint(tmp_path, 12) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "checkpoint-best").mkdir()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert trainer_utils.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-99")
