"""fp16: the loss is scaled in both kinds of step, in checkpoints, and for training steps that users write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgather.ml import Trainer, TrainerCallback, TrainingArguments
from forgather_fn import scaling
from tests.compat import tiny


def made(folder: Path, kind: type[Trainer] = Trainer, callbacks: Any = None, **given: Any) -> Trainer:
    settings = {"max_steps": 6, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.1, "learning_rate": 1e-2}
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **(settings | given))
    return kind(model=tiny.llama(), args=args, train_dataset=tiny.rows("llama"), callbacks=callbacks)


def trained(*given: Any, resume: bool = False, **more: Any) -> Trainer:
    trainer = made(*given, **more)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


class Looking(TrainerCallback):
    """Makes the trainer take its steps in two halves, and writes down the gradients that it sees."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))


class Own(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class Unscaled(Own):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


def test_it_differs_little_from_float32(tmp_path: Path) -> None:
    ours, full = trained(tmp_path, fp16=True), trained(tmp_path)
    assert logged(ours, "loss") == pytest.approx(logged(full, "loss"), rel=1e-2)
    assert logged(ours, "loss") != logged(full, "loss")
    assert logged(ours, "grad_norm") == pytest.approx(logged(full, "grad_norm"), rel=2e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_in_halves_and_own_ones_are_those_of_the_core(tmp_path: Path, accumulate: int) -> None:
    given: dict[str, Any] = {"fp16": True, "gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2}
    look = Looking()
    whole, halves = trained(tmp_path, **given), trained(tmp_path, callbacks=[look], **given)
    own = trained(tmp_path, Own, **given)
    for other in (halves, own):
        assert logged(other, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-3)
        assert logged(other, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-2)
    assert max(look.norms) < 0.11  # unscaled, and clipped


@pytest.mark.parametrize("halves", [False, True])
def test_an_overflow_leaves_the_update_and_the_schedule_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: bool
) -> None:
    monkeypatch.setattr(scaling, "INITIAL", 2.0**21)
    trainer = made(tmp_path, callbacks=[Looking()] if halves else [], fp16=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen: list[bool] = []

    class Comparing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(all(torch.equal(p, before[name]) for name, p in model.named_parameters()))

    trainer.add_callback(Comparing())
    trainer.train()
    left_out = seen.count(True)
    assert 0 < left_out < 6
    assert seen == [True] * left_out + [False] * (6 - left_out)
    rates = logged(trainer, "learning_rate")
    assert len(set(rates[: left_out + 1])) == 1
    assert rates[left_out + 1] < rates[left_out]
    assert trainer.state.global_step == 6


def test_the_scale_is_in_checkpoints_as_torchs_scaler_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 2)
    given: dict[str, Any] = {"fp16": True, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", **given)
    saved = torch.load(tmp_path / "whole" / "checkpoint-6" / "scaler.pt", weights_only=True)
    torch.amp.GradScaler("cpu").load_state_dict(saved)
    assert saved["scale"] != scaling.INITIAL
    trained(tmp_path / "parts", **{**given, "max_steps": 3})
    resumed = trained(tmp_path / "parts", resume=True, **given)
    again = torch.load(tmp_path / "parts" / "checkpoint-6" / "scaler.pt", weights_only=True)
    assert again == saved
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_training_step_that_does_not_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call self\.accelerator\.backward\(loss\) instead"):
        trained(tmp_path, Unscaled, fp16=True)
