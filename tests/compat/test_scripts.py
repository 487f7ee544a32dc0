"""The scripts that the class layer was asked to run, as they are written."""

import torch
from torch import nn

from forgather.ml import Trainer, TrainingArguments
from tests.compat.tiny import Regression, llama, rows


def test_training_by_a_model_factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_factory = llama
    train_dataset, eval_dataset = rows("llama", 40), rows("llama", 8)
    output = Trainer(
        model_init=model_factory,
        args=TrainingArguments(
            output_dir="./output", per_device_train_batch_size=16, num_train_epochs=3, logging_steps=100
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    ).train()
    assert output.global_step == 9
    assert (tmp_path / "output" / "checkpoint-9" / "model.safetensors").exists()


def test_training_by_factories_of_optimizer_and_schedule(tmp_path):
    seen = {}

    def optimizer_factory(named_parameters):
        seen["called"] = dict(named_parameters())
        named = dict(named_parameters)
        seen["iterated"] = named
        return torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.1)

    def scheduler_factory(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)

    model = Regression()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=6, logging_steps=1, save_strategy="no"),
        train_dataset=rows("regression"),
        eval_dataset=rows("regression", 8),
        optimizer_factory=optimizer_factory,
        lr_scheduler_factory=scheduler_factory,
    )
    trainer.train()
    assert list(seen["called"]) == list(seen["iterated"]) == [name for name, _ in model.named_parameters()]
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]))
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_a_scheduler_factory_may_want_a_keyword(tmp_path):
    def scheduler_factory(*, optimizer):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)

    trainer = Trainer(
        model=Regression(),
        args={"output_dir": str(tmp_path), "max_steps": 1, "logging_steps": 1, "save_strategy": "no"},
        train_dataset=rows("regression"),
        lr_scheduler_factory=scheduler_factory,
    )
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 2.5e-5


def test_all_ways_to_give_a_loss_train_alike(tmp_path):
    """A loss of the model's own, in a dict or a tuple; and logits, with a loss function under either name."""

    class Tuple(Regression):
        def forward(self, x, labels=None):
            found = super().forward(x, labels)
            return (found["loss"], found["logits"])

    class Logits(Regression):
        def forward(self, x):
            return super().forward(x)["logits"]

    def counted(outputs, labels, num_items_in_batch=None):
        return nn.functional.mse_loss(outputs, labels, reduction="sum") / num_items_in_batch

    ways = [
        (Regression, {}),
        (Tuple, {}),
        (Logits, {"compute_loss_func": counted}),
        (Logits, {"compute_loss_func": lambda logits, labels: nn.functional.mse_loss(logits, labels)}),
        (Logits, {"loss_fn": nn.functional.mse_loss}),
    ]
    found = []
    for kind, options in ways:
        torch.manual_seed(0)
        trainer = Trainer(
            model=kind(),
            args=TrainingArguments(
                str(tmp_path), max_steps=6, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
                gradient_accumulation_steps=2, save_strategy="no",
            ),
            train_dataset=rows("regression", 23),
            eval_dataset=rows("regression", 9, seed=2),
            **options,
        )  # fmt: skip
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        predictions = trainer.predict(rows("regression", 9, seed=2)).predictions
        found.append((losses, trainer.evaluate()["eval_loss"], predictions))
        trainer.save_model(str(tmp_path / "out"))
        assert predictions.shape == (9,)
    for losses, evaluated, predictions in found[1:]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(found[0][0]), rtol=1e-6, atol=0)
        torch.testing.assert_close(evaluated, found[0][1], rtol=1e-6, atol=0)
        torch.testing.assert_close(predictions, found[0][2], rtol=1e-5, atol=1e-7)


def test_tuples_of_tensors_train_a_plain_module(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(0, 2, (20,)))
    trainer = Trainer(
        model=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        args=TrainingArguments(str(tmp_path), max_steps=4, save_strategy="no"),
        train_dataset=data,
        eval_dataset=data,
        loss_fn=nn.functional.cross_entropy,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(data).predictions.shape == (20, 2)
