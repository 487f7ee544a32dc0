"""The class layer gives the bits of the loop that it stands for."""

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather.ml import PrinterCallback, Trainer, TrainingArguments


class Model(nn.Module):
    """Dropout, running statistics, and a norm that does not decay."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(8))
        self.out = nn.Linear(8, 1)

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.out(self.layers(x))[:, 0], labels)}


def build():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_gives_the_bits_of_the_loop(accumulate, tmp_path):
    generator = torch.Generator().manual_seed(1)
    columns = {"x": torch.randn(32, 3, generator=generator), "labels": torch.randn(32, generator=generator)}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(32)]
    trainer = Trainer(
        model=build(),
        args=TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
            learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=3, seed=7, logging_steps=1,
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    model, total = build(), 16 // accumulate
    decays = set(trainer.get_decay_parameter_names(model))

    program = ff.single(
        ff.Plan(
            model=model,
            loss=ff.losses.Objective(
                total=lambda outputs, batch: outputs["loss"] / accumulate,
                weight=lambda batch: 1.0 / accumulate,
            ),
            optimizer=ff.adamw(weight_decay=0.1, decays=lambda name, tensor: name in decays),
            schedule=ff.schedules.linear(peak=1e-2, warmup=3, total=total),
            transforms=(ff.clipped(0.5),),
            microbatches=accumulate,
        )
    )
    data = ff.batches(columns, batch_size=4 * accumulate, order="torch", seed=7, last="ragged", epochs=2)
    seen = []
    steps = program.steps(program.init(seed=7), data)
    final = ff.last(ff.every(1, lambda tick: seen.append(float(tick.metrics["loss"])))(steps))
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == seen
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(final.params[name], parameter), name
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(final.buffers[name], buffer), name
