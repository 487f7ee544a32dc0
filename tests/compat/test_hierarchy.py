"""Each level of the hierarchy can be subclassed, and asks for no more than it says."""

import inspect

import pytest
import torch

import forgather.ml as ml
import forgather_fn as ff
from tests.compat.tiny import regression, rows


class Plain(ml.AbstractBaseTrainer):
    def train(self):
        return 1

    def evaluate(self):
        return {}

    def save_model(self, output_dir=None):
        self.saved = output_dir


class Told(ml.ExtensibleTrainer):
    def train(self):
        self.callback_handler.on_train_begin(None, None, ml.TrainerControl())

    def evaluate(self):
        return {}

    def save_model(self, output_dir=None):
        pass


class Functional(ml.BaseTrainer):
    def _strategy(self, plan):
        self.plan = plan
        return ff.single(plan)


def test_what_is_abstract():
    assert ml.AbstractBaseTrainer.__abstractmethods__ == {"train", "evaluate", "save_model"}
    assert ml.ExtensibleTrainer.__abstractmethods__ == {"train", "evaluate", "save_model"}
    assert ml.BaseTrainer.__abstractmethods__ == {"_strategy"}
    assert not inspect.isabstract(ml.Trainer)
    assert not inspect.isabstract(ml.AccelTrainer)
    assert not inspect.isabstract(ml.PipelineTrainer)
    for kind in (ml.AbstractBaseTrainer, ml.ExtensibleTrainer, ml.BaseTrainer):
        with pytest.raises(TypeError, match="abstract"):
            kind()
    order = [ml.Trainer, ml.BaseTrainer, ml.ExtensibleTrainer, ml.AbstractBaseTrainer]
    assert [kind for kind in ml.Trainer.__mro__ if kind in order] == order


def test_each_level_can_be_subclassed(tmp_path):
    assert Plain().train() == 1

    class Begins(ml.TrainerCallback):
        seen = 0

        def on_train_begin(self, args, state, control, **kwargs):
            Begins.seen += 1

    told = Told([Begins])
    told.train()
    told.add_callback(Begins())
    told.train()
    assert Begins.seen == 3
    assert isinstance(told.pop_callback(Begins), Begins)
    told.remove_callback(Begins)
    assert not any(isinstance(callback, Begins) for callback in told.callback_handler.callbacks)
    args = ml.TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True)
    made = Functional(model=regression(), args=args, train_dataset=rows("regression"))
    made.train()
    assert isinstance(made.plan, ff.Plan)


def test_the_tokenizer_may_be_set_under_its_older_name(tmp_path):
    made = ml.Trainer(regression(), {"output_dir": str(tmp_path), "use_cpu": True}, tokenizer="one")
    made.tokenizer = "another"
    assert (made.tokenizer, made.processing_class) == ("another", "another")


@pytest.mark.parametrize(("devices", "told"), [(1, False), (2, True)])
def test_accelerators_that_stay_idle_are_told_of(devices, told, tmp_path, monkeypatch, caplog):
    args = ml.TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True)
    made = ml.Trainer(model=regression(), args=args, train_dataset=rows("regression"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setattr(ml.TrainingArguments, "n_gpu", 1)
    made.train()
    assert ("of 2 accelerators this process uses one, with batches of 8 samples" in caplog.text) == told


def test_every_exported_name_is_there():
    for name in ml.__all__:
        assert getattr(ml, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ml.Nothing
    import forgather.ml.trainer as package

    assert package.Trainer is ml.Trainer
