"""Repeated and mixed calls behave, and leave the user's arguments as they are."""

import copy
import functools
import os

import numpy as np
import pytest
import torch
import transformers

import forgather.ml as ours
from tests.compat.test_checkpoints import entries, trainer
from tests.compat.tiny import Regression, regression, rows
from tests.named import named

BOTH = (ours, transformers)
SGD = torch.optim.SGD(regression().parameters())


def losses(made):
    return [log["loss"] for log in made.state.log_history if "loss" in log]


def test_a_second_training_goes_on_from_weights_and_slots(tmp_path):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, save_strategy="no")
        first = made.train()
        before = losses(made)
        second = made.train()
        assert first.global_step == second.global_step == 6
        assert made.state.log_history[0]["step"] == 1
        steps = {int(row["step"]) for row in made.optimizer.state_dict()["state"].values()}
        assert steps == {12}
        found.append(before + losses(made))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_with_a_factory_everything_is_built_anew(tmp_path):
    found = []
    for library in BOTH:
        args = library.TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        made = library.Trainer(
            model_init=Regression, args=args, train_dataset=rows("regression"), eval_dataset=rows("regression", 8)
        )
        before = made.evaluate()["eval_loss"]
        made.train()
        first, after = losses(made), made.evaluate()["eval_loss"]
        made.train()
        assert losses(made) == first
        assert made.evaluate()["eval_loss"] == after != before
        found.append([before, after, *first])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_factory_may_take_a_trial(tmp_path):
    made = ours.Trainer(model_init=lambda trial: Regression(), args={"output_dir": str(tmp_path)})
    assert isinstance(made.model, Regression)
    with pytest.raises(RuntimeError, match="0 or 1 argument"):
        ours.Trainer(model_init=lambda a, b: Regression(), args={"output_dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match="should not return None"):
        ours.Trainer(model_init=lambda: None, args={"output_dir": str(tmp_path)})


def test_a_factory_may_be_a_partial_whose_arguments_are_given_or_have_defaults(tmp_path):
    def build(width, depth=2):
        return torch.nn.Linear(width, depth)

    def tried(trial, width):
        assert trial is None
        return torch.nn.Linear(width, 1)

    for factory in (functools.partial(build, width=3), functools.partial(build, 3), functools.partial(tried, width=3)):
        assert ours.Trainer(model_init=factory, args={"output_dir": str(tmp_path)}).model.in_features == 3


def test_evaluation_before_and_after_training(tmp_path):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, save_strategy="no", per_device_eval_batch_size=3)
        one = made.evaluate()["eval_loss"]
        made.train()
        two, history = made.evaluate()["eval_loss"], [set(log) for log in made.state.log_history]
        predictions = made.predict(rows("regression", 5)).predictions
        made.train()
        found.append(([one, two], history, predictions))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-4)


def test_arguments_are_left_as_they_are(tmp_path):
    args = ours.TrainingArguments(
        str(tmp_path), max_steps=6, save_steps=0.5, logging_steps=0.2, use_cpu=True, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=False, warmup_steps=0.5,
    )  # fmt: skip
    before = copy.deepcopy(args.to_dict())
    made = ours.Trainer(
        model=regression(), args=args, train_dataset=rows("regression"), eval_dataset=rows("regression")
    )
    assert made.args is args
    made.train()
    made.evaluate()
    assert args.to_dict() == before
    assert (made.state.logging_steps, made.state.save_steps) == (2, 3)


def test_arguments_are_read_at_each_training(tmp_path):
    made = trainer(ours, tmp_path, save_strategy="no")
    made.train()
    made.args.max_steps = 3
    made.args.max_grad_norm = 0.0
    made.args.gradient_accumulation_steps = 2
    assert made.train().global_step == 3


def test_several_trainers_use_one_directory_one_after_the_other(tmp_path):
    trainer(ours, tmp_path).train()
    second = trainer(ours, tmp_path, max_steps=4)
    second.train()
    assert entries(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # The newest is the one that was written last, not the one with the highest number.
    assert ours.get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_two_trainers_in_one_process_do_not_meet(tmp_path):
    alone = trainer(ours, tmp_path / "alone", save_strategy="no")
    alone.train()

    class Nested(ours.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer(ours, tmp_path / "inner", max_steps=2).train()

    outer = trainer(ours, tmp_path / "outer", callbacks=[Nested()], save_strategy="no")
    outer.train()
    assert losses(outer) == losses(alone)


def test_one_model_in_two_trainers(tmp_path):
    model = regression()
    first = trainer(ours, tmp_path / "a", model=model, save_strategy="no")
    second = trainer(ours, tmp_path / "b", model=model, save_strategy="no")
    first.train()
    before = model.out.weight.detach().clone()
    second.train()
    assert not torch.equal(model.out.weight, before)
    first.train()
    assert first.state.global_step == 6


def test_a_training_that_fails_leaves_an_ordinary_module(tmp_path):
    class Fails(ours.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("out of luck")

    made = trainer(ours, tmp_path, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match=r"out of luck \[in the callback Fails, on_step_end\]"):
        made.train()
    assert not made.is_in_train
    assert not any(child._state_dict_hooks for child in made.model.modules())
    assert ".lock" not in os.listdir(tmp_path)
    made.pop_callback(Fails)
    assert made.train().global_step == 6


def test_the_global_generators_are_seeded_as_in_transformers(tmp_path):
    found = []
    for library in BOTH:
        trainer(library, tmp_path, seed=11)
        found.append((torch.rand(3), np.random.rand(3)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    np.testing.assert_equal(found[0][1], found[1][1])


def test_a_directory_that_another_process_writes_to_is_refused(tmp_path):
    from forgather_fn.checkpoint import RunLockedError
    from forgather_fn.checkpoint.lock import locked

    with locked(tmp_path), pytest.raises(RunLockedError, match="is being written to by process"):
        trainer(ours, tmp_path).train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, RuntimeError, "requires either a `model` or `model_init`"),
        ({"model": "gpt2"}, ValueError, "expected a torch.nn.Module as its model, got 'gpt2'; a name is loaded by you"),
        ({"model_init": Regression}, ValueError, "but not both"),
        ({"processing_class": 1, "tokenizer": 2}, ValueError, "another name of processing_class"),
        ({"optimizer_cls_and_kwargs": (1, {}), "optimizers": (SGD, None)}, RuntimeError, "incompatible"),
        ({"model": None, "model_init": Regression, "optimizers": (SGD, None)}, RuntimeError, "`model_init` is incomp"),
        ({"train_dataset": iter([])}, ValueError, "does not implement __len__"),
    ],
    ids=named,
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(options, error, message, tmp_path):
    given = {"model": regression(), "args": ours.TrainingArguments(str(tmp_path)), **options}
    with pytest.raises(error, match=message):
        ours.Trainer(**given)


def test_what_is_missing_is_named(tmp_path):
    made = ours.Trainer(model=regression(), args=ours.TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        made.train()
    made.train_dataset = []
    with pytest.raises(ValueError, match=r"the train_dataset \(a list\) is empty"):
        made.train()
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        made.evaluate()
    with pytest.raises(ValueError, match="eval_strategy"):
        ours.Trainer(model=regression(), args=ours.TrainingArguments(str(tmp_path), eval_strategy="epoch"))
    with pytest.raises(ValueError, match="optimizer is None"):
        made.get_learning_rates()
