"""What newcomers give a trainer by mistake is refused where it is given, and not ignored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather.ml import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

ROWS = [{"x": x, "labels": x.sum()} for x in torch.eye(4)]


class Model(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = super().forward(x)[:, 0]
        return {"loss": (found - labels).square().mean(), "logits": found} if labels is not None else {"logits": found}


def trainer(folder: Path, **given: Any) -> Trainer:
    args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, max_steps=1, report_to="none")
    return Trainer(**{"model": Model(), "args": args, "train_dataset": ROWS, **given})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a function as a callback": ({"callbacks": [print]}, "print.* is no callback: it has no method of an event"),
    "one callback": ({"callbacks": PrinterCallback()}, r"callbacks takes a list of them: callbacks=\["),
    "one optimizer": ({"optimizers": torch.optim.SGD(Model().parameters())}, r"a pair, \(optimizer, scheduler\)"),
    "a class of optimizers": ({"optimizers": (torch.optim.AdamW, None)}, "A class goes into optimizer_cls_and_kwargs="),
    "an optimizer of a plan": ({"optimizers": (ff.adamw(), None)}, "one of forgather_fn into a Plan"),
    "an optimizer of another model": (
        {"optimizers": (torch.optim.SGD(Model().parameters()), None)},
        "none of the optimizer's parameters is one of the model's, so that nothing would be trained",
    ),
    "a loader": ({"train_dataset": torch.utils.data.DataLoader(ROWS)}, "train_dataset: a DataLoader gives batches"),
    "a stream": ({"eval_dataset": ff.batches(ROWS, batch_size=2)}, "eval_dataset: a IndexedStream gives batches"),
    "a dataset as arguments": ({"args": ROWS * 100}, r"^args=\[.{,500}\]: expected a TrainingArguments"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_it_is_refused_when_the_trainer_is_made(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **given)


def test_a_callback_that_is_added_later_is_looked_at_too(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="is no callback"):
        made.add_callback(lambda: None)

    class Own:
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    for callback in (Own(), TrainerCallback):
        made.add_callback(callback)


def test_an_optimizer_of_a_part_of_the_model_trains_that_part(tmp_path: Path) -> None:
    model = Model()
    made = trainer(tmp_path, model=model, optimizers=(torch.optim.SGD([model.bias], lr=0.1), None))
    before = model.weight.clone(), model.bias.clone()
    made.train()
    assert torch.equal(model.weight, before[0])
    assert not torch.equal(model.bias, before[1])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("learning_rat", "learning_rate"),
    ],
)
def test_an_argument_that_has_another_name_elsewhere_is_named(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"there is no argument '{name}'; did you mean '{meant}'"):
        TrainingArguments("runs", **{name: 1})
