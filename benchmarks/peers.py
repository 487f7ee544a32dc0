"""Other libraries' loops, each as its own documentation drives it.

Off in all of them, where they have them: loggers, progress bars, checkpoints, model summaries. Each keeps the loss of
every tenth step in a list, by its own means, as the hand-written loop does.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from benchmarks.loops import with_trainer_of
from benchmarks.measure import Clock
from benchmarks.models import next_token_loss
from benchmarks.task import MAX_NORM, REPORT_EVERY, Batch, Task, optimizer_of


@attrs.frozen
class Iterated(Iterable[Batch]):
    """Batches made beforehand, for Lightning, which takes a list for several loaders."""

    batches: list[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def by_accelerate(task: Task, clock: Clock, batches: Iterable[Batch]) -> nn.Module:
    """Train with Accelerate: https://huggingface.co/docs/accelerate/quicktour."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    inner = task.model()
    optimizer = optimizer_of(inner)
    scheduler = LambdaLR(optimizer, clock)
    model, optimizer, scheduler = accelerator.prepare(inner, optimizer, scheduler)
    if isinstance(batches, DataLoader):
        batches = accelerator.prepare(batches)
    reports = []
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        if step % REPORT_EVERY == 0:
            reports.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
    return inner


def by_fabric(task: Task, clock: Clock, batches: Iterable[Batch]) -> nn.Module:
    """Train with Lightning Fabric: https://lightning.ai/docs/fabric/stable/fundamentals/convert.html."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    inner = task.model()
    model, optimizer = fabric.setup(inner, optimizer_of(inner))
    scheduler = LambdaLR(optimizer, clock)
    prepared: Any = fabric.setup_dataloaders(batches) if isinstance(batches, DataLoader) else batches
    reports = []
    for step, batch in enumerate(prepared, start=1):
        optimizer.zero_grad()
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
        fabric.backward(loss)
        norm: Any = fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        scheduler.step()
        if step % REPORT_EVERY == 0:
            reports.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
    return inner


def by_lightning(task: Task, clock: Clock, batches: Iterable[Batch]) -> nn.Module:
    """Train with the Lightning Trainer: https://lightning.ai/docs/pytorch/stable/starter/introduction.html."""
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()
            self.reports: list[float] = []

        def training_step(self, batch: Batch, index: int) -> Tensor:
            return next_token_loss(self.model(batch["input_ids"]), batch["labels"])

        def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
            if (index + 1) % REPORT_EVERY == 0:
                self.reports.append(outputs["loss"].item())

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.model)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": LambdaLR(optimizer, clock), "interval": "step"},
            }

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to use worker processes, and on what is switched off below
        trainer = lightning.Trainer(
            max_steps=task.updates,
            gradient_clip_val=MAX_NORM,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
    return module.model


def by_transformers(task: Task, clock: Clock, **arguments: Any) -> nn.Module:
    """Train with transformers.Trainer: https://huggingface.co/docs/transformers/trainer."""
    import transformers

    return with_trainer_of(transformers, task, clock, report_to="none", **arguments)
