"""What callbacks and users hold are live objects: what is written into them counts."""

import copy
import types

import pytest
import torch
import transformers
from torch import nn

import forgather.ml as ours
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import Regression, llama, regression, rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no", "weight_decay": 0.1, "max_grad_norm": 0.5}
BASE = transformers.TrainerCallback


def alike(tmp_path, callback=None, kind="regression", *, prepare=None, rel=1e-5, **options):
    """Train with either library, with a callback or a preparation of the trainer; compare weights and logs."""
    found = []
    for library in BOTH:
        made = trainer(
            library, tmp_path / library.__name__, kind, callbacks=[callback()] if callback else None,
            **{**PLAIN, **options},
        )  # fmt: skip
        if prepare:
            prepare(made)
        made.train()
        found.append(made)
    for name in ("loss", "grad_norm", "learning_rate"):
        one, other = ([log[name] for log in made.state.log_history if name in log] for made in found)
        assert one == pytest.approx(other, rel=rel), name
    for (name, mine), theirs in zip(found[0].model.named_parameters(), found[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    return found[0]


def test_written_parameters_count(tmp_path):
    class Writes(BASE):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.out.weight.mul_(0.5)
                model.hidden.weight.data = model.hidden.weight.data * 0.9

    alike(tmp_path, Writes)


def test_loaded_weights_count(tmp_path):
    class Loads(BASE):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.load_state_dict(regression().state_dict())

    alike(tmp_path, Loads)


def test_written_options_of_the_optimizer_count(tmp_path):
    class Writes(BASE):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            optimizer.param_groups[0]["lr"] = 3e-3
            optimizer.param_groups[0]["weight_decay"] = 0.5
            if state.global_step == 3:
                optimizer.param_groups[1]["betas"] = optimizer.param_groups[0]["betas"] = (0.8, 0.9)

    alike(tmp_path, Writes)


def test_written_slots_count(tmp_path):
    class Writes(BASE):
        def on_step_end(self, args, state, control, optimizer, model, **kwargs):
            row = optimizer.state[model.out.weight]
            assert set(row) == {"step", "exp_avg", "exp_avg_sq"}
            assert int(row["step"]) == state.global_step - (4 if state.global_step > 4 else 0)
            if state.global_step == 2:
                row["exp_avg"].zero_()
            if state.global_step == 4:
                optimizer.state.clear()

    alike(tmp_path, Writes)


def test_the_optimizer_shows_what_the_update_made(tmp_path):
    class Looks(BASE):
        def on_optimizer_step(self, args, state, control, optimizer, model, **kwargs):
            self.slots = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters()}

    found = []
    for library in BOTH:
        looks = Looks()
        trainer(library, tmp_path, callbacks=[looks], **PLAIN).train()
        found.append(looks.slots)
    for name, slot in found[1].items():
        torch.testing.assert_close(found[0][name], slot, rtol=1e-4, atol=1e-12)


def test_a_loaded_state_of_the_optimizer_counts(tmp_path):
    class Loads(BASE):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 1:
                self.kept = copy.deepcopy(optimizer.state_dict())
            if state.global_step == 4:
                optimizer.load_state_dict(self.kept)

    alike(tmp_path, Loads)


def test_clipped_gradients_are_shown_and_may_be_changed(tmp_path):
    class Changes(BASE):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            assert norm <= 0.5 + 1e-5
            model.out.bias.grad.zero_()
            model.out.weight.grad = torch.ones_like(model.out.weight)

    alike(tmp_path, Changes)


def test_freezing_and_unfreezing_count(tmp_path):
    class Freezes(BASE):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.hidden.requires_grad_(state.global_step < 2 or state.global_step >= 4)

    alike(tmp_path, Freezes)


def test_what_was_frozen_at_first_and_belongs_to_the_optimizer_is_trained_later(tmp_path):
    def prepare(made):
        made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-2)
        made.model.hidden.requires_grad_(False)

    class Unfreezes(BASE):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.hidden.requires_grad_(state.global_step >= 2)

    alike(tmp_path, Unfreezes, prepare=prepare)


def test_groups_added_by_a_callback_are_trained(tmp_path):
    def prepare(made):
        made.optimizer = torch.optim.AdamW(made.model.out.parameters(), lr=1e-2)
        made.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: 1.0)

    class Adds(BASE):
        def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
            if state.global_step == 2:
                optimizer.add_param_group({"params": list(model.hidden.parameters()), "lr": 1e-3, "initial_lr": 1e-3})
                lr_scheduler.lr_lambdas.append(lambda step: 1.0)
                lr_scheduler.base_lrs.append(1e-3)

    alike(tmp_path, Adds, prepare=prepare)


def test_parameters_that_the_optimizer_was_not_given_take_part_in_the_norm_and_stay(tmp_path):
    def prepare(made):
        made.optimizer = torch.optim.AdamW(made.model.out.parameters(), lr=1e-2)

    made = alike(tmp_path, prepare=prepare)
    assert torch.equal(made.model.hidden.weight, regression().hidden.weight)


@pytest.mark.parametrize(
    "factory",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda ps: torch.optim.SGD(ps, lr=0.05),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, dampening=0.5),
        lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01),
        lambda ps: torch.optim.Adagrad(ps, lr=0.01),
        lambda ps: torch.optim.NAdam(ps, lr=0.01),
    ],
    ids=["sgd", "plain sgd", "dampened", "adam", "amsgrad", "rmsprop", "adagrad", "nadam"],
)
def test_any_optimizer_of_torch_is_adopted(factory, tmp_path):
    def prepare(made):
        made.optimizer = factory(made.model.parameters())

    alike(tmp_path, prepare=prepare)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adamw_torch", "adafactor"])
def test_optimizers_by_name(name, tmp_path):
    alike(tmp_path, optim=name)


def test_an_optimizer_of_the_users_own(tmp_path):
    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.add_(p.grad.sign(), alpha=-group["lr"])

    found = []
    for library in BOTH:
        args = library.TrainingArguments(
            str(tmp_path), max_steps=5, logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **PLAIN
        )
        made = library.Trainer(
            model=regression(), args=args, train_dataset=rows("regression"),
            optimizer_cls_and_kwargs=(Signs, {"lr": 1e-2}),
        )  # fmt: skip
        made.train()
        found.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
def test_an_optimizer_with_modes_is_put_into_each_in_time(looks, tmp_path):
    """One without a schedule: it steps on points between which and their mean it goes back and forth."""

    class Averaging(torch.optim.SGD):
        training = False

        def _exchange(self, training):
            if self.training != training:
                for p in self.param_groups[0]["params"]:
                    other = self.state[p].setdefault("other", p.detach().clone())
                    kept = p.detach().clone()
                    p.data.copy_(other)
                    other.copy_(kept)
            self.training = training

        def train(self):
            self._exchange(True)

        def eval(self):
            self._exchange(False)

        def step(self, closure=None):
            assert self.training, "the optimizer was not in train mode"
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["other"].lerp_(p.detach(), 0.5)

    class Looks(BASE):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pass

    def prepare(made):
        made.optimizer = Averaging(made.model.parameters(), lr=0.1)
        made.eval_dataset = rows("regression", 8)

    made = alike(tmp_path, Looks if looks else None, prepare=prepare, eval_strategy="steps", eval_steps=2)
    assert not made.optimizer.training


def counted(optimizer, calls, scale):
    """Put another step into an optimizer, which changes something."""
    inner = optimizer.step

    def step(self, *args, **kwargs):
        calls.append(1)
        for group in self.param_groups:
            group["lr"] *= scale
        return inner(*args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_was_put_into_the_optimizer_is_called(factory, tmp_path):
    calls = []

    def prepare(made):
        made.optimizer = factory(made.model.parameters(), lr=1e-2)
        counted(made.optimizer, calls, 0.5)

    alike(tmp_path, prepare=prepare, max_steps=3)
    assert len(calls) == 6


def test_a_step_that_is_put_into_the_optimizer_while_training_is_called(tmp_path):
    calls = []

    class Puts(BASE):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 2:
                counted(optimizer, calls, 0.5)

    alike(tmp_path, Puts, max_steps=5)
    assert len(calls) == 6


def test_groups_with_rates_of_their_own(tmp_path):
    def prepare(made):
        model = made.model
        made.optimizer = torch.optim.AdamW(
            [
                {"params": model.hidden.parameters(), "lr": 1e-3, "weight_decay": 0.0},
                {"params": model.norm.parameters(), "lr": 1e-2, "weight_decay": 0.1},
                {"params": model.out.parameters(), "lr": 3e-2, "weight_decay": 0.0},
            ]
        )

    alike(tmp_path, prepare=prepare, warmup_steps=2)


@pytest.mark.parametrize("change", ["double", "bfloat16"])
def test_a_module_that_is_converted_is_trained_on(change, tmp_path):
    class Converts(ours.TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 2:
                getattr(model, change)()
                self.before = optimizer.state[model.out.weight]["exp_avg"].clone()
            if state.global_step == 3:
                after = optimizer.state[model.out.weight]
                assert after["exp_avg"].dtype == model.out.weight.dtype
                assert int(after["step"]) == 3

    class Loose(Regression):
        def forward(self, x, labels=None):
            found = super().forward(x.to(self.out.weight.dtype), None)["logits"]
            return {"loss": nn.functional.mse_loss(found.double(), labels.double())}

    torch.manual_seed(0)
    made = trainer(ours, tmp_path, model=Loose(), callbacks=[Converts()], **PLAIN)
    made.train()
    assert made.state.global_step == 6
    assert made.model.out.weight.dtype == getattr(torch, {"double": "float64"}.get(change, change))


def test_embeddings_may_be_resized_before_training(tmp_path):
    class Resizes(ours.TrainerCallback):
        def on_init_end(self, args, state, control, model, **kwargs):
            model.resize_token_embeddings(30)

    made = trainer(ours, tmp_path, "llama", callbacks=[Resizes()], **PLAIN)
    before = made.model.get_input_embeddings().weight.detach().clone()
    made.train()
    assert made.model.get_input_embeddings().weight.shape[0] == 30
    assert not torch.equal(made.model.get_input_embeddings().weight, before)


def test_a_parameter_that_is_replaced_while_training_is_refused_by_name(tmp_path):
    class Resizes(ours.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.resize_token_embeddings(30)

    made = trainer(ours, tmp_path, "llama", callbacks=[Resizes()], **PLAIN)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight was replaced while training runs"):
        made.train()


def test_the_module_is_an_ordinary_one_afterwards(tmp_path):
    made = trainer(ours, tmp_path, "llama", **PLAIN)
    made.train()
    model = made.model
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert p.grad is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(child._state_dict_hooks for child in model.modules())
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_training_goes_on_by_hand(tmp_path):
    """The optimizer is a real one: it goes on where the trainer left it."""
    made = trainer(ours, tmp_path, "llama", lr_scheduler_type="constant", **PLAIN)
    made.train()
    before = made.optimizer.state[made.model.model.embed_tokens.weight]["exp_avg"].clone()
    batch = {name: torch.stack([row[name] for row in rows("llama", 4)]) for name in ("input_ids", "labels")}
    made.model(**batch).loss.backward()
    made.optimizer.step()
    after = made.optimizer.state[made.model.model.embed_tokens.weight]
    assert int(after["step"]) == 7
    assert not torch.equal(after["exp_avg"], before)


def test_arguments_may_be_those_of_transformers(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    made = ours.Trainer(model=llama(), args=args, train_dataset=rows("llama"))
    assert made.train().global_step == 3
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_callbacks_of_transformers_run_unmodified(tmp_path):
    made = trainer(
        ours, tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, max_steps=30, save_steps=1,
        metric_for_best_model="loss", learning_rate=1.0, save_strategy="steps",
        callbacks=[transformers.EarlyStoppingCallback(2), transformers.trainer_callback.ProgressCallback()],
    )  # fmt: skip
    made.train()
    assert made.state.global_step < 30
    assert "EarlyStoppingCallback" in made.state.stateful_callbacks


def test_arguments_of_transformers_are_read_at_each_training(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True
    )
    made = ours.Trainer(model=regression(), args=args, train_dataset=rows("regression"))
    made.train()
    args.max_steps = 5
    assert made.train().global_step == 5
    made.args.max_steps = 2
    assert made.train().global_step == 2


def test_a_written_accumulation_counts(tmp_path):
    class Writes(BASE):
        def on_epoch_begin(self, args, state, control, **kwargs):
            args.gradient_accumulation_steps = 2 if state.global_step < 3 else 1

    def prepare(made):
        made.train_dataset = rows("regression", 24)

    made = alike(tmp_path, Writes, prepare=prepare, max_steps=7)
    assert made.current_gradient_accumulation_steps == 1


def test_an_accumulation_written_between_steps_counts_from_the_next_one(tmp_path):
    class Writes(ours.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.gradient_accumulation_steps = 3
            self.seen = [*getattr(self, "seen", ()), made.current_gradient_accumulation_steps]

    writes = Writes()
    made = trainer(ours, tmp_path, callbacks=[writes], **{**PLAIN, "max_steps": 2})
    made.train()
    assert writes.seen == [1, 3]


def test_a_written_norm_counts(tmp_path):
    class Writes(BASE):
        def on_step_end(self, args, state, control, **kwargs):
            args.max_grad_norm = {1: 1e-3, 3: 0.0}.get(state.global_step, args.max_grad_norm)

    def prepare(made):
        made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)

    alike(tmp_path, Writes, prepare=prepare)


def test_a_callback_that_comes_later_is_watched_as_well(tmp_path):
    class Extends(ours.TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 4:
                optimizer.add_param_group({"params": list(model.hidden.parameters())})

    class Adds(ours.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            made.pop_callback(Adds)

        def on_step_end(self, args, state, control, **kwargs):
            raise AssertionError("it was taken out")

    made = trainer(ours, tmp_path, callbacks=[Adds()], **PLAIN)
    made.optimizer = torch.optim.AdamW(made.model.out.parameters(), lr=1e-2)
    made.lr_scheduler = torch.optim.lr_scheduler.StepLR(made.optimizer, step_size=100)

    original = made.get_batch_samples

    def get_batch_samples(*args):
        if made.state.global_step == 2 and not any(isinstance(c, Extends) for c in made.callback_handler.callbacks):
            made.add_callback(Extends())
        return original(*args)

    made.get_batch_samples = get_batch_samples
    made.train()
    assert len(made.optimizer.param_groups) == 2
    assert not torch.equal(made.model.hidden.weight, regression().hidden.weight)
