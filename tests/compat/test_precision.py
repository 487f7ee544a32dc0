"""bf16 and fp16: the model runs under autocast, and what is made of its outputs in float32, as with Accelerate."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import forgather.ml as ours
from forgather.ml.trainer.model_settings import mixed_precision
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import Regression, rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no", "max_grad_norm": 0.5, "lr_scheduler_type": "constant"}


class Looks(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass


def logs(made, *names):
    return [[log[name] for log in made.state.log_history if name in log] for name in names]


def contrast(z):
    """A loss that half precision spoils: similarities divided by a small temperature."""
    alike = z @ z.T / 0.01
    return nn.functional.cross_entropy(
        alike.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e4), torch.arange(len(z)).roll(1)
    )


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 16)

    def forward(self, x, labels=None):
        return {"z": nn.functional.normalize(self.linear(x), dim=-1)}


@pytest.mark.parametrize("how", ["whole", "halves", "override"])
def test_a_loss_of_the_users_own_computes_in_float32(how, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        assert outputs["z"].dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        outputs["z"].detach().numpy()
        return contrast(outputs["z"])

    def make(base):
        class Own(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(inputs["x"])
                found = loss(outputs, None)
                return (found, outputs) if return_outputs else found

        return Own if how == "override" else base

    found = []
    for library in BOTH:
        torch.manual_seed(0)
        made = trainer(
            library, tmp_path, model=Embeds(), cls=make(library.Trainer), bf16=True,
            callbacks=[Looks()] if how == "halves" else None, **PLAIN,
        )  # fmt: skip
        if how != "override":
            made.compute_loss_func = loss
        made.train()
        found.append(logs(made, "loss", "grad_norm"))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_a_language_model_trains_as_with_transformers(options, tmp_path):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path, "llama", bf16=True, **options, **PLAIN)
        made.train()
        found.append(logs(made, "loss", "grad_norm"))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-2)  # sums in half precision are taken in another order


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_metrics_get_float32(precision, tmp_path):
    def metrics(prediction):
        assert prediction.predictions.dtype == np.float32
        return {"mean": prediction.predictions.mean()}

    def preprocess(logits, labels):
        return torch.from_numpy(logits.numpy() * 2)

    found = []
    for library in (ours,) if precision == "fp16" else BOTH:  # Accelerate has fp16 on no CPU
        made = trainer(library, tmp_path, **{precision: True}, **PLAIN)
        made.compute_metrics, made.preprocess_logits_for_metrics = metrics, preprocess
        found.append([made.evaluate()[name] for name in ("eval_mean", "eval_loss")])
        assert made.predict(rows("regression", 3)).predictions.dtype == np.float32
    assert found[0] == pytest.approx(found[-1], rel=1e-6)


def test_a_half_precision_of_the_model_itself_stays(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs["logits"].dtype)
        return nn.functional.mse_loss(outputs["logits"].float(), labels)

    class Half(Regression):
        def forward(self, x, labels=None):
            return super().forward(x.bfloat16())

    made = trainer(ours, tmp_path, model=Half().bfloat16(), **PLAIN)
    made.compute_loss_func = loss
    made.train()
    assert set(seen) == {torch.bfloat16}


def test_what_a_callback_calls_and_copies_is_the_model(tmp_path):
    class Calls(ours.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            x = torch.randn(2, 3)
            assert model(x)["logits"].dtype == torch.float32
            assert not torch.equal(model(x)["logits"], copy.deepcopy(model)(x)["logits"])  # one under autocast
            pickle.dumps(model)

    made = trainer(ours, tmp_path, bf16=True, callbacks=[Calls()], **PLAIN)
    made.train()
    made.evaluate()
    assert made.model._compiled_call_impl is None


def test_a_compiled_model_runs_under_autocast(tmp_path):
    found = []
    for backend in (None, "eager"):
        made = trainer(ours, tmp_path, "llama", bf16=True, torch_compile_backend=backend, **{**PLAIN, "max_steps": 2})
        made.train()
        found.append(logs(made, "loss"))
    torch._dynamo.reset()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)


def test_outputs_of_all_forms_are_widened():
    class Nested(nn.Module):
        def forward(self, x):
            y = x @ x
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=y.sum(), logits=y, hidden_states=(y, None))

    args = ours.TrainingArguments("x", use_cpu=True, bf16=True)
    model, x = Nested(), torch.ones(2, 2)
    with mixed_precision(model, args):
        outputs = model(x)
    assert type(outputs) is transformers.modeling_outputs.CausalLMOutputWithPast
    assert [outputs.loss.dtype, outputs.logits.dtype, outputs.hidden_states[0].dtype] == [torch.float32] * 3
