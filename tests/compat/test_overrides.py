"""What users override is called, decides, and trains as in transformers."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

import forgather.ml as ours
from forgather.ml.trainer.checking import NEVER_CALLED
from forgather.ml.trainer.lacking import LACKING
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no", "weight_decay": 0.1, "max_grad_norm": 0.5}


def losses(made):
    return [log["loss"] for log in made.state.log_history if "loss" in log]


def norms(made):
    return [log["grad_norm"] for log in made.state.log_history if "grad_norm" in log]


def alike(tmp_path, make, kind="regression", **options):
    """Train by a subclass of either trainer; give both."""
    found = []
    for library in BOTH:
        made = trainer(
            library, tmp_path / library.__name__, kind, cls=make(library.Trainer), **{**PLAIN, **options}
        )  # fmt: skip
        made.train()
        found.append(made)
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)
    assert norms(found[0]) == pytest.approx(norms(found[1]), rel=1e-5)
    for (name, mine), theirs in zip(found[0].model.named_parameters(), found[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    return found[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["regression", "llama"])
def test_compute_loss(kind, accumulate, tmp_path):
    def make(base):
        class Mine(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(
                    model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
                penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
                loss = loss + penalty * (0.5 if accumulate == 2 and kind == "llama" else 1.0)
                return (loss, outputs) if return_outputs else loss

        return Mine

    alike(tmp_path, make, kind, gradient_accumulation_steps=accumulate, max_steps=5 if accumulate == 1 else 2)


def test_compute_loss_with_a_loss_of_its_own(tmp_path):
    def make(base):
        class Mine(base):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                loss = nn.functional.l1_loss(outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        return Mine

    alike(tmp_path, make)


def test_compute_loss_as_version_4_had_it(tmp_path):
    class Mine(ours.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return super().compute_loss(model, inputs, return_outputs)

    made = trainer(ours, tmp_path / "a", cls=Mine, **PLAIN)
    made.train()
    plain = trainer(ours, tmp_path / "b", **PLAIN)
    plain.train()
    assert losses(made) == pytest.approx(losses(plain), rel=1e-6)
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_the_halved_step_has_the_bits_of_the_whole_one(tmp_path):
    """With dropout, buffers, and accumulation: whoever looks inside changes nothing."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

        def forward(self, x, labels=None):
            return {"loss": nn.functional.mse_loss(self.layers(x)[:, 0], labels)}

    class Looks(ours.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            assert all(p.grad is not None for p in model.parameters())

    states = []
    for callbacks in (None, [Looks()]):
        torch.manual_seed(0)
        made = trainer(
            ours, tmp_path, model=Model(), callbacks=callbacks, gradient_accumulation_steps=2, max_grad_norm=100.0,
            save_strategy="no", max_steps=5,
        )  # fmt: skip
        made.train()
        states.append(made.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("keeps", [False, True], ids=["plain", "own train"])
def test_every_step_puts_the_whole_model_into_training_mode(keeps, looks, tmp_path):
    """A part that was put into evaluation mode from outside is trained; what an override of train() says holds."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out, self.calls = nn.BatchNorm1d(3), nn.Linear(3, 1), 0

        def train(self, mode=True):
            super().train(mode)
            self.calls += mode
            self.norm.train(mode and not keeps)
            return self

        def forward(self, x, labels=None):
            return {"loss": nn.functional.mse_loss(self.out(self.norm(x))[:, 0], labels)}

    class Looks(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pass

    found = []
    for library in BOTH:
        torch.manual_seed(0)
        model = Normed()
        model.norm.eval()
        before = model.calls
        made = trainer(library, tmp_path, model=model, callbacks=[Looks()] if looks else None, **PLAIN)
        made.train()
        found.append((losses(made), model.norm.training, model.calls - before, model.norm.running_mean))
    assert found[0][:3] == (pytest.approx(found[1][0], rel=1e-5), *found[1][1:3])
    torch.testing.assert_close(found[0][3], found[1][3])


@pytest.mark.parametrize("early", [False, True], ids=["asked late", "asked early"])
def test_an_override_is_told_which_microbatch_is_the_last(early, tmp_path):
    """As Accelerate tells it, by which overrides act once for a step."""
    found = []
    for library in BOTH:
        seen = []

        def make(base, seen=seen):
            class Mine(base):
                def training_step(self, *args, **kwargs):
                    if early:
                        seen.append(self.accelerator.sync_gradients)
                    loss = super().training_step(*args, **kwargs)
                    seen.append(self.accelerator.sync_gradients)
                    return loss

            return Mine

        options = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1, **PLAIN}
        made = trainer(library, tmp_path / library.__name__, cls=make(library.Trainer), **options)
        made.train()
        found.append((seen, made.accelerator.sync_gradients))
    assert found[0] == found[1]
    assert {True, False} == set(found[0][0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_that_a_training_step_unfreezes_is_trained_in_that_step(accumulate, tmp_path):
    """It counts in the norm too, and its slots go on where they were."""

    def make(base):
        class Mine(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                model.hidden.weight.requires_grad_(self.state.global_step % 3 != 1)
                return super().training_step(model, inputs, num_items_in_batch)

        return Mine

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pass

    even = {"per_device_train_batch_size": 11, "gradient_accumulation_steps": accumulate, "learning_rate": 0.05}
    alike(tmp_path, make, max_steps=8, callbacks=[Looks()], **even)


def test_a_mean_of_another_kind_accumulates_as_it_says(tmp_path):
    """One over sequences, whatever their numbers of labels: nothing but its author knows what the step's mean is."""

    class EachSequence(ours.Trainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits, labels = model(input_ids=inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
            losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
            loss = (losses.sum(-1) / labels.ne(-100).sum(-1)).mean() / self.current_gradient_accumulation_steps
            return (loss, {}) if return_outputs else loss

    found = []
    for accumulate in (1, 4):
        made = trainer(
            ours, tmp_path, "llama", cls=EachSequence, per_device_train_batch_size=8 // accumulate, max_steps=1,
            gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential", **PLAIN,
        )  # fmt: skip
        made.train()
        found.append((losses(made), norms(made)))
    assert found[1] == (pytest.approx(found[0][0], rel=1e-5), pytest.approx(found[0][1], rel=1e-5))


def test_training_step_fills_gradients(tmp_path):
    def make(base):
        class Mine(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                model.train()
                inputs = self._prepare_inputs(inputs)
                loss = self.compute_loss(model, inputs) * 2
                self.accelerator.backward(loss)
                return loss.detach()

        return Mine

    alike(tmp_path, make)


def test_training_step_may_wrap_the_original(tmp_path):
    def make(base):
        class Mine(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                inputs = {**inputs, "x": inputs["x"] * 2}
                return super().training_step(model, inputs, num_items_in_batch)

        return Mine

    alike(tmp_path, make, gradient_accumulation_steps=2, max_steps=2)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_a_training_step_may_leave_a_batch_out(optim, tmp_path):
    """As those do that go on when memory runs out: nothing is updated, and the step counts."""

    def make(base):
        class Mine(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                if self.state.global_step in (0, 3):
                    return torch.tensor(0.0)
                return super().training_step(model, inputs, num_items_in_batch)

        return Mine

    with pytest.warns(UserWarning, match="no parameter has a gradient after training_step, and the step updates none"):
        made = alike(tmp_path, make, optim=optim)
    assert [norm == 0 for norm in norms(made)] == [True, False, False, True, False, False]


def test_a_training_step_may_leave_a_batch_out_in_half_precision(tmp_path):
    class Mine(ours.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return torch.tensor(0.0)

    made = trainer(ours, tmp_path, cls=Mine, fp16=True, **{**PLAIN, "max_steps": 2})
    before = [p.detach().clone() for p in made.model.parameters()]
    with pytest.warns(UserWarning, match="updates none"):
        assert made.train().global_step == 2
    assert all(map(torch.equal, before, made.model.parameters()))


def test_prepare_inputs(tmp_path):
    def make(base):
        class Mine(base):
            def _prepare_inputs(self, inputs):
                inputs = super()._prepare_inputs(inputs)
                return {**inputs, "labels": inputs["labels"] * 3}

        return Mine

    alike(tmp_path, make)


def test_loaders_and_samplers(tmp_path):
    def loader(base):
        class Mine(base):
            def get_train_dataloader(self):
                return DataLoader(self.train_dataset, batch_size=5, collate_fn=self.data_collator)

            def get_eval_dataloader(self, eval_dataset=None):
                return DataLoader(self.eval_dataset, batch_size=3, collate_fn=self.data_collator)

        return Mine

    made = alike(tmp_path, loader)
    assert made.evaluate()["eval_loss"] > 0

    def sampler(base):
        class Mine(base):
            def _get_train_sampler(self, train_dataset=None):
                return SequentialSampler(self.train_dataset)

        return Mine

    alike(tmp_path, sampler)

    def random(base):
        class Mine(base):
            def _get_train_sampler(self, train_dataset=None):
                return torch.utils.data.RandomSampler(self.train_dataset)

        return Mine

    alike(tmp_path, random)


def test_create_optimizer(tmp_path):
    def make(base):
        class Mine(base):
            def create_optimizer(self, model=None):
                if self.optimizer is None:
                    heads = [p for n, p in self.model.named_parameters() if n.startswith("out")]
                    rest = [p for n, p in self.model.named_parameters() if not n.startswith("out")]
                    self.optimizer = torch.optim.AdamW(
                        [{"params": heads, "lr": 3e-2}, {"params": rest, "lr": 1e-3, "weight_decay": 0.3}]
                    )
                return self.optimizer

        return Mine

    made = alike(tmp_path, make)
    assert made.get_learning_rates() == [0.0, 0.0]


def test_create_scheduler(tmp_path):
    def make(base):
        class Mine(base):
            def create_scheduler(self, num_training_steps, optimizer=None):
                self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
                return self.lr_scheduler

        return Mine

    alike(tmp_path, make)


def test_create_optimizer_and_scheduler(tmp_path):
    def make(base):
        class Mine(base):
            def create_optimizer_and_scheduler(self, num_training_steps):
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    self.optimizer, lambda step: 1 - step / num_training_steps
                )

        return Mine

    # transformers calls create_optimizer and create_scheduler by themselves in its newest version.
    made = trainer(ours, tmp_path, cls=make(ours.Trainer), **PLAIN)
    made.train()
    assert type(made.optimizer) is torch.optim.SGD
    assert made.state.log_history[0]["learning_rate"] == 0.05


def test_get_batch_samples_and_log(tmp_path):
    def make(base):
        class Mine(base):
            def get_batch_samples(self, epoch_iterator, num_batches, device):
                batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
                return [{**batch, "x": batch["x"] + 1} for batch in batches], items

            def log(self, logs, start_time=None):
                logs["mine"] = 1.0
                super().log(logs, start_time)

        return Mine

    made = alike(tmp_path, make)
    assert all(log["mine"] == 1.0 for log in made.state.log_history)


def test_prediction_step_and_evaluation_loop(tmp_path):
    def make(base):
        class Mine(base):
            def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
                loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
                return loss * 2, logits * 0, labels

            def evaluation_loop(self, dataloader, description, *args, **kwargs):
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
                output.metrics["eval_extra"] = 5.0
                return output

        return Mine

    found = []
    for library in BOTH:
        made = trainer(library, tmp_path, cls=make(library.Trainer), per_device_eval_batch_size=3)
        found.append((made.evaluate(), made.predict(rows("regression", 6))))
    assert found[0][0]["eval_extra"] == 5.0
    assert found[0][0]["eval_loss"] == pytest.approx(found[1][0]["eval_loss"], rel=1e-6)
    assert not found[0][1].predictions.any()


def test_a_method_may_be_replaced_on_the_object(tmp_path):
    made = trainer(ours, tmp_path, **PLAIN)
    original, seen = made.compute_loss, []

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        seen.append(1)
        return original(model, inputs, return_outputs, num_items_in_batch)

    made.compute_loss = compute_loss
    made.train()
    assert len(seen) == 6


@pytest.mark.parametrize("how", ["items", "mean", "flag"])
def test_accumulation_equals_the_large_batch_however_the_loss_is_scaled(how, tmp_path):
    """By one that divides by the number of items, one that ignores it, and one that says so."""

    class Mine(ours.Trainer):
        loss_is_scaled_for_ga = False if how == "flag" else None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            total = nn.functional.cross_entropy(
                logits.reshape(-1, 23), inputs["labels"][:, 1:].reshape(-1), reduction="sum"
            )
            if how == "flag":
                num_items_in_batch.add(0)  # looks at it, and divides by its own
            own = inputs["labels"][:, 1:].ne(-100).sum()
            return total / (num_items_in_batch if how == "items" else own)

    found = []
    for accumulate, batch in ((1, 8), (4, 2)):
        made = trainer(
            ours, tmp_path, "llama", cls=Mine, gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=batch, **PLAIN,
        )  # fmt: skip
        made.train()
        found.append((losses(made), norms(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "gpt2", "regression"])
def test_accumulation_equals_the_large_batch_for_any_model(kind, tmp_path):
    found = []
    for accumulate, batch in ((1, 8), (4, 2)):
        made = trainer(
            ours, tmp_path, kind, gradient_accumulation_steps=accumulate, per_device_train_batch_size=batch, **PLAIN
        )
        made.train()
        found.append((losses(made), norms(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=2e-5)


def test_the_number_of_items_is_that_of_the_whole_step(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(float(num_items_in_batch))
        return nn.functional.mse_loss(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    made = trainer(ours, tmp_path, gradient_accumulation_steps=3, max_steps=2, **PLAIN)
    made.compute_loss_func = loss
    made.train()
    assert seen[:3] == [12.0] * 3
    assert seen[3:] == [10.0] * 3


@pytest.mark.parametrize("takes_items", [False, True])
def test_a_loss_may_be_a_module(takes_items, tmp_path):
    class Own(nn.Module):
        def forward(self, outputs, labels, num_items_in_batch=None):
            return nn.functional.mse_loss(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    found = []
    for loss in (None, Own() if takes_items else nn.MSELoss()):
        made = trainer(ours, tmp_path, gradient_accumulation_steps=2, **PLAIN)
        made.compute_loss_func = loss
        made.train()
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_search_is_refused_with_the_loop_to_write(tmp_path):
    with pytest.raises(ValueError, match="for learning_rate in"):
        trainer(ours, tmp_path).hyperparameter_search()


def test_logging_may_be_wrapped(tmp_path):
    def make(base):
        class Mine(base):
            def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
                self.seen = [*getattr(self, "seen", []), (round(float(tr_loss), 4), round(float(grad_norm), 4))]
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

        return Mine

    found = []
    for library in BOTH:
        made = trainer(library, tmp_path, cls=make(library.Trainer), **{**PLAIN, "logging_steps": 3})
        made.train()
        found.append(made.seen)
    assert found[0] == found[1]


def test_an_override_that_would_never_be_called_is_refused_by_name(tmp_path):
    class Mine(ours.Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            pass

    with pytest.raises(ValueError, match="Mine overrides _inner_training_loop, a method of transformers' Trainer"):
        trainer(ours, tmp_path, cls=Mine)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accumulation_equals_the_large_batch_when_compiled(kind, tmp_path):
    found = []
    for accumulate, batch, backend in ((1, 8, None), (2, 4, "eager")):
        made = trainer(
            ours, tmp_path, kind, gradient_accumulation_steps=accumulate, per_device_train_batch_size=batch,
            torch_compile_backend=backend, **{**PLAIN, "max_steps": 2},
        )  # fmt: skip
        made.train()
        found.append((losses(made), norms(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=2e-5)


THEIRS = {
    name: one
    for name, one in vars(transformers.Trainer).items()
    if not name.startswith("__") and (callable(one) or isinstance(one, property | staticmethod))
}
REFUSED = ("hyperparameter_search", "push_to_hub")
"""Methods that take anything, since they refuse to do it."""


def test_each_method_of_transformers_is_there_or_its_override_is_refused():
    missing = {name for name in THEIRS if not hasattr(ours.Trainer, name)}
    assert missing == {name for name in NEVER_CALLED if name in THEIRS}
    assert not [name for name in NEVER_CALLED if hasattr(ours.Trainer, name)]


def test_methods_take_what_they_take_in_transformers():
    for name in sorted(name for name in THEIRS if callable(getattr(ours.Trainer, name, None)) and name not in REFUSED):
        kinds = [getattr(library.Trainer, name) for library in BOTH]
        mine, theirs = ([p for p in inspect.signature(kind).parameters if p != "self"] for kind in kinds)
        assert mine[: len(theirs)] == theirs, name


def test_where_a_model_is_moved_to_is_for_an_override_to_say(tmp_path):
    def make(base):
        class Mine(base):
            def _move_model_to_device(self, model, device):
                self.moved = [*getattr(self, "moved", []), str(device)]

        return Mine

    assert set(alike(tmp_path, make).moved) == {"cpu"}


def test_an_attribute_of_transformers_is_here_or_says_what_is_instead(tmp_path):
    mine, theirs = (trainer(library, tmp_path, max_steps=1, neftune_noise_alpha=None, **PLAIN) for library in BOTH)
    theirs.train()
    names = {*vars(theirs), *dir(type(theirs))} - {"__backends", "__dict__"}
    missing = {name for name in names if not hasattr(mine, name)}
    assert missing <= {*LACKING, *NEVER_CALLED}
    for name in missing:
        with pytest.raises(AttributeError, match=f"Trainer has no {name}, which transformers' Trainer has: "):
            getattr(mine, name)
    with pytest.raises(AttributeError, match="'Trainer' object has no attribute 'gather_functions'"):
        mine.gather_functions  # noqa: B018 - it is the look at it that fails


def test_what_a_property_of_a_subclass_lacks_is_named(tmp_path):
    class Broken(ours.Trainer):
        @property
        def depth(self):
            return self.model.depth

    with pytest.raises(AttributeError, match="'Regression' object has no attribute 'depth'"):
        trainer(ours, tmp_path, cls=Broken).depth  # noqa: B018 - it is the look at it that fails


def test_what_a_copied_evaluation_loop_gathers_with_is_there(tmp_path):
    class Gathers(ours.Trainer):
        def evaluation_loop(self, *args, **kwargs):
            seen.append(self.gather_function(torch.arange(3)).tolist())
            self.gather_function = self.accelerator.gather
            seen.append(self.gather_function(torch.arange(2)).tolist())
            return super().evaluation_loop(*args, **kwargs)

    seen = []
    assert trainer(ours, tmp_path, cls=Gathers, **PLAIN).evaluate()["eval_loss"] > 0
    assert seen == [[0, 1, 2], [0, 1]]
