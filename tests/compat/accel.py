"""Trainings that tests run on several processes: functions of a module, so that they can be named to the processes."""

import contextlib
import io
import os
import random
import signal
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import forgather.ml as ml
from tests.compat.tiny import SMALL, WORDS, Regression, double, regression, rows

TIMES = ("runtime", "_per_second", "preparation_time", "total_flos")
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
STEP = 4
"""Microbatches of a step, over all processes."""


def llama() -> Any:
    """A language model with dropout."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=WORDS, num_key_value_heads=1, tie_word_embeddings=True, attention_dropout=0.3
    )
    return transformers.LlamaForCausalLM(config)


def in_double(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {n: v.double() if torch.is_floating_point(torch.as_tensor(v)) else v for n, v in r.items()} for r in samples
    ]


class Lines(IterableDataset):
    """Samples of which none can be had by its number; only the first process may read them."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        assert int(os.environ.get("RANK", "0")) == 0, "read by another process than the first"
        return iter(self.samples)


class Everywhere(Lines):
    """The same, for any process."""

    def __iter__(self) -> Any:
        return iter(self.samples)


class Numbered(Dataset):
    """Samples that have numbers; only the first process may read them."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        assert int(os.environ.get("RANK", "0")) == 0, "read by another process than the first"
        return self.samples[index]


class Measured(list[Any]):
    """Samples of which it is said how long they are."""

    column_names = ("length",)

    def __getitem__(self, index: Any) -> Any:
        return [i * 7 % 11 for i in range(len(self))] if index == "length" else super().__getitem__(index)


class Shaken(Dataset):
    """Samples that draw random numbers each time."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        shaken = self.samples[index]["x"] + 0.1 * torch.rand(3, dtype=torch.float64)
        return {"x": shaken * random.random() + np.random.random(), "labels": self.samples[index]["labels"]}


class Doubled(ml.AccelTrainer):
    """Overrides the training step, and uses the trainer's own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super().training_step(model, inputs, num_items_in_batch)


class Own(ml.AccelTrainer):
    """Has a training step of its own, as it is written for DistributedDataParallel."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = model(**inputs)["loss"] / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class Weighed(ml.AccelTrainer):
    """Has a loss of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"] * 2, outputs) if return_outputs else outputs["loss"] * 2


class Shuffled(ml.AccelTrainer):
    """Has a loader of its own, shuffled by a generator that is another one in each process."""

    def get_train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(self.args.process_index)
        return DataLoader(self.train_dataset, batch_size=3, shuffle=True, generator=generator)


class Prepared(ml.AccelTrainer):
    """Has a loader that Accelerate has shared out already."""

    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=3))


class Split(ml.AccelTrainer):
    """Has a loader that gives each process samples of its own."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, sampler=DistributedSampler(self.train_dataset))


class Looks(ml.TrainerCallback):
    """Looks at gradients between the backward pass and the update."""

    norms: list[float]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        state.log_history.append({"looked": norm})


class Given:
    """Tells what a compute_metrics is given."""

    def __call__(self, prediction: Any) -> dict[str, float]:
        kinds = {"predictions": prediction.predictions, "labels": prediction.label_ids, "inputs": prediction.inputs}
        sums = {name: int((np.arange(1, 1 + found.size) * found.ravel()).sum()) for name, found in kinds.items()}
        return {**sums, "losses": float(np.cumsum(prediction.losses).sum()), "rows": len(prediction.losses)}


class Trouble:
    """What a compute_metrics sees is kept in the log."""

    def __init__(self) -> None:
        self.right, self.seen = 0.0, 0

    def __call__(self, prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        labels = torch.as_tensor(prediction.label_ids)
        self.right += float((torch.as_tensor(logits).double().reshape(len(labels), -1)[:, 0] - labels).sum())
        self.seen += len(labels)
        if compute_result is False:
            return {}
        found = {"mean_error": self.right / self.seen, "seen": self.seen}
        self.__init__()
        return found


CASES: dict[str, dict[str, Any]] = {
    "a language model": {"model": llama, "kind": "llama", "include_num_input_tokens_seen": "all"},
    "in pairs": {"model": llama, "kind": "llama", "reduction": "tree"},
    "in bfloat16": {"model": llama, "kind": "llama", "reduction": "tree", "bf16": True, "single": True},
    "in float32": {"reduction": "tree", "single": True, "eval_strategy": "steps", "eval_steps": 3},
    "an optimizer that is called": {"optim": "rmsprop", "weight_decay": 0.1},
    "a rate that follows a metric": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0},
        "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3,
    },
    "an override of the step": {"cls": Doubled},
    "an own step": {"cls": Own, "count": 24},
    "an own loss": {"cls": Weighed},
    "a look between": {"callbacks": [Looks], "model": llama, "kind": "llama"},
    "a loss function": {"compute_loss_func": torch.nn.functional.mse_loss},
    "an own loader": {"cls": Shuffled},
    "a loader of Accelerate": {"cls": Prepared},
    "lines": {"data": Lines},
    "lines that each reads": {"data": Everywhere, "accelerator_config": {"dispatch_batches": False}},
    "read by the first": {"data": Numbered, "accelerator_config": {"dispatch_batches": True}},
    "samples that draw": {"data": Shaken},
    "an evaluation that draws": {"held": Shaken, "eval_strategy": "steps", "eval_steps": 3},
    "grouped by length": {
        "model": llama, "kind": "llama", "train_sampling_strategy": "group_by_length", "data": Measured,
    },
    "what metrics are given": {
        "model": llama, "kind": "llama", "compute_metrics": Given, "eval_strategy": "epoch", "max_eval_steps": 5,
        "include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
    "the best model": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "learning_rate": 0.5, "callbacks": [ml.EarlyStoppingCallback],
    },
    "in float16": {"cls": Doubled, "fp16": True, "single": True, "optim": "sgd", "tolerance": 1e-5},
    "in float16 and in pairs": {"fp16": True, "single": True, "reduction": "tree"},
    "metrics": {"compute_metrics": Trouble, "eval_strategy": "epoch"},
    "metrics batch by batch": {"compute_metrics": Trouble, "eval_strategy": "epoch", "batch_eval_metrics": True},
}  # fmt: skip


def made(case: str, processes: int, folder: str, **changes: Any) -> Any:
    """Make the trainer of a case, with steps of as many microbatches on any number of processes."""
    given = {**CASES[case], **changes}
    kind, data = given.pop("kind", "regression"), given.pop("data", list)
    build, cls, single = given.pop("model", regression), given.pop("cls", ml.AccelTrainer), given.pop("single", False)
    convert = list if single else in_double
    train, held = convert(rows(kind, given.pop("count", 26))), convert(rows(kind, 13, seed=5))
    given.pop("tolerance", None)
    passed = ("callbacks", "compute_loss_func", "preprocess_logits_for_metrics")
    own = {name: given.pop(name) for name in passed if name in given}
    measured = given.pop("held", list)
    if "compute_metrics" in given:
        own["compute_metrics"] = given.pop("compute_metrics")()
    options = {
        "per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "max_steps": 7, "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 1e-2, "gradient_accumulation_steps": STEP // processes, **QUIET,
    }  # fmt: skip
    args = ml.AccelTrainingArguments(folder, **{**options, **given})
    model = build() if single else build().double()
    trainer = cls(model=model, args=args, train_dataset=data(train), eval_dataset=measured(held), **own)
    trainer.pop_callback(ml.PrinterCallback)
    return trainer


def run(trainer: Any, single: bool = False, **options: Any) -> dict[str, Any]:
    """Train and predict, and give what came of it."""
    with contextlib.nullcontext() if single else double():
        result = trainer.train(**options)
        predicted = trainer.predict(trainer.eval_dataset)
    first = lambda nest: nest[0] if isinstance(nest, tuple) else nest  # noqa: E731 - only here
    logs = [{n: v for n, v in row.items() if not n.endswith(TIMES)} for row in trainer.state.log_history]
    slots = {
        f"{i}/{name}": slot
        for i, row in trainer.optimizer.state_dict()["state"].items()
        for name, slot in row.items()
        if isinstance(slot, torch.Tensor)
    }
    return {
        "tensors": {name: p.detach().clone() for name, p in trainer.model.named_parameters()} | slots,
        "logs": logs,
        "predictions": torch.from_numpy(first(predicted.predictions)),
        "labels": torch.from_numpy(first(predicted.label_ids)),
        "place": (result.global_step, trainer.state.epoch, trainer.state.total_flos, trainer.state.max_steps),
        "flags": (trainer.state.is_world_process_zero, trainer.args.world_size, trainer.args.process_index),
    }


def trained(case: str, processes: int, folder: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return run(made(case, processes, folder, **(changes or {})), CASES[case].get("single", False))


def resumed(case: str, processes: int, folder: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    trainer = made(case, processes, folder, save_strategy="steps", save_steps=3, **(changes or {}))
    return run(trainer, CASES[case].get("single", False), resume_from_checkpoint=True)


class Normed(Regression):
    """A model whose norm has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)


def normed(folder: str, cls: Any) -> dict[str, torch.Tensor]:
    trainer = made("in float32", 2, folder, model=Normed, cls=cls, reduction="sum")
    trainer.train()
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


class Asks(ml.TrainerCallback):
    """Asks for what another process does not ask for."""

    def __init__(self, at: int, flag: str) -> None:
        self.at, self.flag = at, flag

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            setattr(control, self.flag, True)


def asked(folder: str) -> dict[str, Any]:
    """Let the first process alone ask for an evaluation, a log and the end; and the second alone for an early end."""
    trainer = made("in float32", 2, folder, eval_strategy="no", logging_steps=100)
    trainer.compute_metrics = lambda prediction: {"rank": trainer.args.process_index}
    if trainer.args.process_index == 0:
        for at, flag in ((2, "should_evaluate"), (3, "should_log"), (5, "should_training_stop")):
            trainer.add_callback(Asks(at, flag))
    else:
        trainer.add_callback(Asks(1, "should_training_stop"))
    return run(trainer, True)


def other_arguments(folder: str) -> None:
    made("in float32", 2, folder, seed=int(os.environ["RANK"])).train()


def other_data(folder: str) -> None:
    made("in float32", 2, folder, count=26 - int(os.environ["RANK"]) * 4).train()


def commanded(folder: str) -> dict[str, Any]:
    """Let somebody outside ask for an evaluation, and then for a save and the end, at the first process."""
    controlled = ml.TrainerControlCallback(enable_http=False)

    class Outside(ml.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            word = {1: "evaluate", 60: "save-stop"}.get(state.global_step)
            if word and args.process_index == 0:
                controlled.inbox.post(word)

    # Commands are looked for some fifty times a second, so they come some steps later.
    trainer = made("in float32", 2, folder, eval_steps=5000, max_steps=2000, logging_steps=1000)
    trainer.add_callback(controlled)
    trainer.add_callback(Outside())
    return run(trainer, True)


def diverged(folder: str) -> int:
    """Let a loss of one process become infinite, and go on with another training."""

    class Breaks(ml.AccelTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            bad = self.state.global_step == 3 and self.args.process_index == 1
            return loss / 0 if bad else loss

    trainer = made("in float32", 2, folder, cls=Breaks, reduction="sum", eval_strategy="no")
    with pytest.raises(ValueError, match="was not finite"):
        trainer.train()
    return int(trainer.state.global_step)


def looked_at_by_one(folder: str) -> dict[str, Any]:
    """Let the second process alone look inside steps, from the third one on."""

    class Comes(ml.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                trainer.add_callback(Looks())

    trainer = made("a language model", 2, folder)
    if trainer.args.process_index == 1:
        trainer.add_callback(Comes())
    found = run(trainer)
    found["looked"] = sum("looked" in row for row in found["logs"])
    found["logs"] = [row for row in found["logs"] if "looked" not in row]
    return found


def signalled(folder: str) -> int:
    """Send the signal of a scheduler to the second process alone."""

    class Ends(ml.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = made("in float32", 2, folder, enable_jit_checkpoint=True)
    trainer.add_callback(Ends())
    steps: int = trainer.train().global_step
    return steps


def noisy(folder: str) -> tuple[str, str]:
    """Train with everything that prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        trainer = made(
            "in float32", 2, folder, save_strategy="steps", save_steps=3, disable_tqdm=False, report_to="tensorboard",
            callbacks=[ml.JsonLogger()],
        )  # fmt: skip
        trainer.add_callback(ml.PrinterCallback())
        metrics = trainer.train().metrics
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_model()
        trainer.save_state()
    return out.getvalue(), err.getvalue()


class FullError(OSError):
    """The disk is full."""


class Full(ml.AccelTrainer):
    """Cannot write its third checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)
        if self.state.global_step == 6:
            raise FullError("no space left")


def not_saved(folder: str) -> None:
    trainer = made("in float32", 2, folder, cls=Full, save_strategy="steps", save_steps=2, eval_strategy="no")
    try:
        trainer.train()
    except (RuntimeError, OSError) as error:
        error.add_note(f"at step {trainer.state.global_step}")
        raise


def plainly_refused(folder: str) -> None:
    args = ml.TrainingArguments(folder, max_steps=1, **QUIET)
    ml.Trainer(model=regression(), args=args, train_dataset=rows("regression")).train()


def in_turn(folder: str) -> tuple[bool, list[str]]:
    """Let the first process fill a cache."""
    args = ml.AccelTrainingArguments(folder, **QUIET)
    with args.main_process_first(desc="fill"):
        before = sorted(os.listdir(folder))
        if not before:
            with open(os.path.join(folder, "cache"), "w") as file:
                file.write("filled")
    return args.process_index == 0, before


def other_models(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the model with other numbers in each process, and evaluate before any training."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    args = ml.AccelTrainingArguments(folder, **QUIET)
    trainer = ml.AccelTrainer(
        model=torch.nn.Linear(3, 1), args=args, accelerator=accelerate.Accelerator(cpu=True),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (outputs[:, 0] - labels).square().mean(),
        eval_dataset=[(row["x"], row["labels"]) for row in rows("regression", 7)],
    )  # fmt: skip
    return trainer.model.weight.detach().clone(), torch.tensor(trainer.evaluate()["eval_loss"])
