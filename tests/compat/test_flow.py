"""What callbacks ask for is done, and when, as in transformers."""

import json
import os
import signal

import pytest
import transformers
from transformers.trainer_callback import ExportableState

import forgather.ml as ours
from tests.compat.test_checkpoints import entries, trainer
from tests.compat.tiny import rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no"}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}


def losses(made):
    return [round(log["loss"], 4) for log in made.state.log_history if "loss" in log]


class Asks(transformers.TrainerCallback):
    """Sets flags of the control at an event of a step."""

    def __init__(self, event, step, *flags):
        def ask(args, state, control, **kwargs):
            if state.global_step % step == 0:
                for flag in flags:
                    setattr(control, flag, True)
            return control

        setattr(self, event, ask)


def both(tmp_path, make_callback, look, **options):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, callbacks=[make_callback()], **{**PLAIN, **options})
        made.train()
        found.append(look(made))
    assert found[0] == found[1]
    return found[0]


def look(made):
    history = [(log["step"], sorted(log)) for log in made.state.log_history]
    return made.state.global_step, round(float(made.state.epoch), 9), losses(made), history


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_substep_end", "on_optimizer_step"])
@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_an_end_that_is_asked_for_comes_when_it_does_in_transformers(flag, event, accumulate, tmp_path):
    steps = {"on_step_begin": 2, "on_substep_end": 2}.get(event, 3)

    def seen(made):  # a step that is cut short counts for the mean loss of transformers, and not here
        return made.state.global_step, round(float(made.state.epoch), 9)

    both(tmp_path, lambda: Asks(event, steps, flag), seen, gradient_accumulation_steps=accumulate, **EPOCHS)


def test_what_is_asked_for_off_the_intervals_is_done(tmp_path):
    flags = ("should_save", "should_evaluate", "should_log")
    found = both(tmp_path, lambda: Asks("on_step_end", 4, *flags), look, logging_strategy="no")
    assert [step for step, _ in found[3]] == [4, 4, 6]
    assert entries(tmp_path / ours.__name__) == entries(tmp_path / transformers.__name__) == ["checkpoint-4"]


def test_what_is_asked_for_at_the_end_of_an_epoch_is_done(tmp_path):
    both(tmp_path, lambda: Asks("on_epoch_end", 6, "should_save", "should_evaluate"), look, **EPOCHS)
    assert entries(tmp_path / ours.__name__) == entries(tmp_path / transformers.__name__)


def test_evaluations_may_be_delayed(tmp_path):
    nothing = lambda: Asks("on_log", 100)  # noqa: E731
    both(tmp_path / "a", nothing, look, eval_strategy="steps", eval_steps=2, eval_delay=3)
    both(tmp_path / "b", nothing, look, eval_strategy="epoch", eval_delay=2, **EPOCHS)


class Counts(transformers.TrainerCallback, ExportableState):
    def __init__(self, start=0):
        self.start, self.count = start, start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("restores", [True, False])
def test_callbacks_get_their_state_back_where_that_was_asked_for(restores, tmp_path):
    found = []
    for library in BOTH:
        folder = tmp_path / library.__name__
        trainer(library, folder, callbacks=[Counts(5)], max_steps=4).train()
        saved = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
        made = trainer(
            library, folder, callbacks=[Counts(1)], max_steps=6, restore_callback_states_from_checkpoint=restores
        )
        made.train(resume_from_checkpoint=True)
        count = next(c for c in made.callback_handler.callbacks if isinstance(c, Counts))
        found.append((saved["Counts"], count.start, count.count, sorted(saved)))
    assert found[0] == found[1]
    assert found[0][2] == (11 if restores else 3)


def test_a_best_model_of_before_is_remembered(tmp_path):
    found = []
    for library in BOTH:
        folder = tmp_path / library.__name__
        options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
        trainer(library, folder, max_steps=4, **options).train()
        made = trainer(library, folder, max_steps=8, **options)
        made.train(resume_from_checkpoint=True)
        found.append((made.state.best_global_step, round(made.state.best_metric, 3), entries(folder)))
    assert found[0] == found[1]


def test_an_evaluation_may_come_with_each_save(tmp_path):
    made = trainer(ours, tmp_path, eval_on_save=True, save_steps=3)
    made.train()
    assert [log["step"] for log in made.state.log_history if "eval_loss" in log] == [3, 6]
    assert "eval_loss" in (tmp_path / "checkpoint-3" / "manifest.json").read_text()


def test_nothing_to_train_ends_at_once(tmp_path):
    found = []
    for library in BOTH:
        output = trainer(library, tmp_path, max_steps=-1, num_train_epochs=0, **PLAIN).train()
        found.append((output.global_step, sorted(output.metrics)))
    assert found[0] == found[1]


def test_the_training_arguments_of_a_checkpoint_are_those_of_the_run(tmp_path):
    import torch

    made = trainer(ours, tmp_path)
    made.train_dataset = rows("regression")
    made.train()
    held = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert isinstance(held, ours.TrainingArguments)
    assert held.to_dict() == made.args.to_dict()


def test_a_run_that_is_preempted_saves_and_ends(tmp_path):
    class Preempts(ours.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    made = trainer(ours, tmp_path, callbacks=[Preempts()], enable_jit_checkpoint=True, save_strategy="no")
    assert made.train().global_step == 3
    assert entries(tmp_path) == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) is before
    other = trainer(ours, tmp_path, save_strategy="no")
    assert other.train(resume_from_checkpoint=True).global_step == 6
