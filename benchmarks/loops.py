"""This library's loop, and the one that a good engineer writes by hand."""

import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import toolz
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler

import forgather_fn as ff
from benchmarks.measure import Clock
from benchmarks.models import WithLoss, next_token_loss
from benchmarks.task import MAX_NORM, PEAK, REPORT_EVERY, WEIGHT_DECAY, Batch, Rows, Task, optimizer_of


def loader(task: Task) -> DataLoader[Batch]:
    """Make torch's loader as people write it, shuffling in the task's order."""
    rows = Rows(task.tokens)
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, batch_size=task.batch_size, sampler=sampler)


def by_hand(task: Task, clock: Clock, batches: Iterable[Batch]) -> nn.Module:
    """Train with nothing but torch."""
    return by_hand_with(task.model(), clock, batches)


def by_hand_with(model: nn.Module, clock: Clock, batches: Iterable[Batch]) -> nn.Module:
    """Train a given model, from the weights that it has."""
    optimizer = optimizer_of(model)
    scheduler = LambdaLR(optimizer, clock)
    reports = []
    for step, batch in enumerate(batches, start=1):
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0:
            reports.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
    return model


def by_library(task: Task, clock: Clock, data: ff.Stream | Iterable[Batch]) -> nn.Module:
    """Train with forgather_fn."""
    return by_program(ff.single(plan_of(task, lambda: clock)), task, data)


def plan_of(task: Task, clock: Callable[[], Clock], **fields: Any) -> ff.Plan:
    """Make the plan of a task, with what is not as usual."""
    plain: dict[str, Any] = {
        "model": task.model,
        "loss": ff.losses.causal_lm,
        "optimizer": ff.adamw(weight_decay=WEIGHT_DECAY),
        "schedule": lambda step: PEAK * clock()(step),
        "transforms": (ff.clipped(MAX_NORM),),
    }
    return ff.Plan(**plain | fields)


def by_program(program: ff.Program, task: Task, data: ff.Stream | Iterable[Batch]) -> nn.Module:
    """Train from the beginning with a program, which may be used again."""
    reports: list[Any] = []
    toolz.pipe(
        program.steps(program.init(0), data),
        ff.every(REPORT_EVERY, ff.report(reports.append)),
        ff.until(steps=task.updates),
        ff.last,
    )
    return program.module()  # bound to the last state: its parameters are views of that state's


def by_trainer(task: Task, clock: Clock) -> nn.Module:
    """Train with the class layer, as a user of transformers.Trainer does."""
    from forgather import ml

    return with_trainer_of(ml, task, clock)


def with_trainer_of(library: Any, task: Task, clock: Clock, **arguments: Any) -> nn.Module:
    """Train with the trainer of a library, which is transformers, or has its interface."""
    model = task.model()
    optimizer = optimizer_of(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = library.Trainer(
            model=WithLoss(model),
            args=library.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=task.batch_size,
                max_steps=task.updates,
                learning_rate=PEAK,
                max_grad_norm=MAX_NORM,
                logging_steps=REPORT_EVERY,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
                **arguments,
            ),
            train_dataset=Rows(task.tokens),
            optimizers=(optimizer, LambdaLR(optimizer, clock)),
        )
        trainer.remove_callback(library.PrinterCallback)  # it stands in for the progress bar; the log is kept anyway
        trainer.train()
    return model


def streamed(task: Task, dataset: Any) -> ff.Stream:
    """Make this library's stream of a dataset, in the task's order."""
    return ff.batches(dataset, batch_size=task.batch_size, order="torch", seed=0)


def columns(task: Task) -> dict[str, torch.Tensor]:
    """Give the training samples as a dict of tensors, which this library slices without a loop."""
    return {"input_ids": task.tokens, "labels": task.tokens}
