"""float16: the loss scale is data of the state, saved and read as GradScaler's."""

import pytest
import torch

import forgather.ml as ours
from tests.compat.test_checkpoints import trainer

OPTIONS = {"fp16": True, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-3}


def losses(made):
    return [log["loss"] for log in made.state.log_history if "loss" in log]


def starting_at(scale, made):
    """Let a trainer start at a loss scale of its own: the first one is so large that some gradients overflow."""
    load = made._load_scaler_of

    def replaced(checkpoint):
        made._engine.state.loss_scale["scale"].fill_(scale)
        load(checkpoint)

    made._load_scaler_of = replaced
    return made


class Looks(ours.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass


@pytest.mark.parametrize("callbacks", [None, [Looks()]], ids=["whole", "halves"])
def test_training_is_near_that_in_float32_and_goes_on(callbacks, tmp_path):
    plain = trainer(ours, tmp_path / "plain", **{**OPTIONS, "fp16": False})
    plain.train()
    whole = starting_at(2.0**10, trainer(ours, tmp_path / "a", callbacks=callbacks, **OPTIONS))
    whole.train()
    assert losses(whole) == pytest.approx(losses(plain), rel=5e-3)
    assert losses(whole) != losses(plain)
    held = torch.load(tmp_path / "a" / "checkpoint-3" / "scaler.pt", weights_only=True)
    assert held["_growth_tracker"] == 3
    torch.amp.GradScaler("cpu").load_state_dict(held)
    other = trainer(ours, tmp_path / "b", callbacks=callbacks, **OPTIONS)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(other) == losses(whole)
    assert torch.load(tmp_path / "b" / "checkpoint-6" / "scaler.pt", weights_only=True)["_growth_tracker"] == 6


@pytest.mark.parametrize("callbacks", [None, [Looks()]], ids=["whole", "halves"])
def test_a_gradient_that_overflows_halves_the_scale_and_waits_with_the_schedule(callbacks, tmp_path):
    made = trainer(ours, tmp_path, callbacks=callbacks, **{**OPTIONS, "max_steps": 4, "save_steps": 1})
    starting_at(2.0**120, made).train()
    scales = [
        torch.load(tmp_path / f"checkpoint-{step}" / "scaler.pt", weights_only=True)["scale"] for step in range(1, 5)
    ]
    assert scales == [2.0**119, 2.0**118, 2.0**117, 2.0**116]
    assert [log["learning_rate"] for log in made.state.log_history if "loss" in log] == [1e-3] * 4


def test_an_overflow_right_after_a_setting_was_changed_waits_with_the_schedule(tmp_path):
    class Changes(ours.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                args.max_grad_norm = 0.3
                made._engine.state.loss_scale["scale"].fill_(2.0**120)

    made = trainer(ours, tmp_path, callbacks=[Changes()], **{**OPTIONS, "max_steps": 4, "save_strategy": "no"})
    starting_at(2.0**10, made).train()
    rates = [log["learning_rate"] for log in made.state.log_history if "loss" in log]
    assert rates[0] > rates[1] > rates[2] == rates[3]
