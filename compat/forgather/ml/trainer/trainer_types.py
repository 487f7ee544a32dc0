"""What trainers keep, take and give: their state, their control, and the tuples that they return."""

import difflib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from forgather_fn.checkpoint.foreign import read_json
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.signature import expected

Exported = TypeVar("Exported", bound="ExportableState")


class ExportableState:
    """What has a state that goes into ``trainer_state.json`` with each checkpoint, and comes back from it."""

    def state(self) -> dict[str, Any]:
        """Give ``{"args": arguments of the constructor, "attributes": what is set afterwards}``, as JSON holds it."""
        raise NotImplementedError("You must implement a `state` function to utilize this class.")

    @classmethod
    def from_state(cls: type[Exported], state: Mapping[str, Any]) -> Exported:
        """Make one from what ``state()`` gave."""
        made = cls(**state["args"])
        for name, value in state["attributes"].items():
            setattr(made, name, value)
        return made


def exported(callbacks: Iterable[ExportableState]) -> dict[str, Any]:
    """Give the states of callbacks under the names of their classes; as a list where a class has several.

    Raises:
        TypeError: One of them cannot be exported.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for one in callbacks:
        # By what it can do: transformers' own callbacks have another base of this name.
        if not (hasattr(one, "state") and hasattr(one, "from_state")):
            raise TypeError(
                f"All callbacks passed to be saved must inherit `ExportableState`, but received {type(one)}"
            )
        found.setdefault(type(one).__name__, []).append(one.state())
    return {name: states[0] if len(states) == 1 else states for name, states in found.items()}


@dataclass
class TrainerState:
    """Where a run is. Callbacks read it, and ``trainer_state.json`` in each checkpoint is it.

    Attributes:
        epoch: Passes over the training data, with the share of the one in progress.
        global_step: Updates made.
        max_steps: Updates that the run makes.
        logging_steps: Updates between two logs; like the next two, absolute here, where arguments may give a share.
        eval_steps: Updates between two evaluations.
        save_steps: Updates between two saves.
        train_batch_size: Samples of one forward pass; recorded since auto_find_batch_size may lower it.
        num_train_epochs: Passes that the run makes, rounded up.
        num_input_tokens_seen: Counted where include_num_input_tokens_seen asks for it.
        total_flos: Floating-point operations, as the model estimates them.
        log_history: What was logged, each with its step.
        best_metric: The best value of metric_for_best_model.
        best_global_step: The update at which it was found.
        best_model_checkpoint: The checkpoint that was saved with it.
        is_local_process_zero: Whether this is the first process of its machine.
        is_world_process_zero: Whether this is the first of all processes.
        is_hyper_param_search: Always false here; kept for callbacks that read it.
        trial_name: As above, None.
        trial_params: As above, None.
        stateful_callbacks: The states of callbacks, by class name; callbacks themselves are accepted and exported.
    """

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = None  # type: ignore[assignment]  # a list, once made
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None
    stateful_callbacks: dict[str, Any] = None  # type: ignore[assignment]  # a dict, once made

    def __post_init__(self) -> None:
        """Make the lists that are empty at first, and export callbacks."""
        if self.log_history is None:
            self.log_history = []
        if self.stateful_callbacks is None:
            self.stateful_callbacks = {}
        elif not isinstance(self.stateful_callbacks, dict):
            self.stateful_callbacks = exported(self.stateful_callbacks)

    def save_to_json(self, json_path: str | Path) -> None:
        """Write it as transformers does."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        Path(json_path).write_text(text, encoding="utf-8")

    @classmethod
    def load_from_json(cls, json_path: str | Path) -> "TrainerState":
        """Read what :meth:`save_to_json`, or transformers, wrote.

        Raises:
            ValueError: It is no such file: a field has another name, or is of another type.
            OSError: It cannot be read.
        """
        record = read_json(Path(json_path))
        if not isinstance(record, dict):
            raise CheckpointError(f"{json_path}: expected a JSON object, the state of a trainer")
        hints = get_type_hints(cls)
        for name, value in record.items():
            if name not in hints:
                known = ", ".join(difflib.get_close_matches(name, hints, n=len(hints), cutoff=0.0))
                raise CheckpointError(f"{json_path}: a trainer's state has no {name[:80]!r}; it has {known}")
            one = None if value is None else expected(hints[name])
            if one is not None and not one.takes(value):
                raise CheckpointError(f"{json_path}: {one.refusal(name, value)}")
        logs, states = record.get("log_history") or [], record.get("stateful_callbacks") or {}
        listed = isinstance(logs, list) and all(isinstance(one, dict) for one in logs)
        if not listed or not isinstance(states, dict) or not (record.get("global_step") or 0) >= 0:
            raise CheckpointError(
                f"{json_path}: expected a list of logs, the states of callbacks by name, and a number of updates"
            )
        return cls(**record | {"log_history": logs, "stateful_callbacks": states})

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Take the intervals from arguments; shares become numbers of updates, rounded up."""
        for kind in ("logging", "eval", "save"):
            steps = getattr(args, f"{kind}_steps")
            if steps is not None:
                setattr(self, f"{kind}_steps", math.ceil(max_steps * steps) if steps < 1 else steps)

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any = None) -> None:
        """Take what a trainer knows of a run that begins."""
        self.trial_name = self.trial_params = None
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


@dataclass
class TrainerControl(ExportableState):
    """What callbacks ask a trainer to do. Each flag is cleared when what it asks for is done.

    Attributes:
        should_training_stop: End the run after this update; cleared when a run begins.
        should_epoch_stop: End the epoch after this update; cleared when an epoch begins.
        should_save: Save after this update; this and the next two are cleared when an update begins.
        should_evaluate: Evaluate after this update.
        should_log: Log after this update.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def _new_training(self) -> None:
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        self.should_save = self.should_evaluate = self.should_log = False

    def state(self) -> dict[str, Any]:
        """Give the flags."""
        return {"args": asdict(self), "attributes": {}}


class EvalPrediction:
    """What ``compute_metrics`` gets: predictions and labels, and what ``include_for_metrics`` asks for.

    It can be unpacked and indexed: ``predictions, label_ids = prediction``.

    Attributes:
        predictions: What the model gave, as arrays of numpy or a tuple of them.
        label_ids: What it should have given.
        inputs: What it was given, or None.
        losses: Its losses, or None.
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        self.elements = (predictions, label_ids, *(one for one in (inputs, losses) if one is not None))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __getitem__(self, idx: int) -> Any:
        if not 0 <= idx < len(self.elements):
            raise IndexError("tuple index out of range")
        return self.elements[idx]


class EvalLoopOutput(NamedTuple):
    """What ``evaluation_loop`` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    num_samples: int | None


class PredictionOutput(NamedTuple):
    """What ``predict`` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None


class TrainOutput(NamedTuple):
    """What ``train`` returns."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class BestRun(NamedTuple):
    """The best run of a search over hyperparameters."""

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any = None


def get_last_checkpoint(folder: str | Path) -> str | None:
    """Find the checkpoint of a run that was written last and is whole; None if there is none.

    Directories that a save did not finish, or whose files are missing or cut short, are passed over: it is the one that
    ``train(resume_from_checkpoint=True)`` goes on from.
    """
    from forgather.ml.trainer.unharmed import newest_checkpoint

    return newest_checkpoint(folder)


def speed_metrics(
    split: str,
    start_time: float,
    num_samples: int | None = None,
    num_steps: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, float]:
    """Measure how fast something was that has just ended.

    Args:
        split: What the names begin with: ``train``, ``eval``, ``test``.
        start_time: ``time.time()`` when it began.
        num_samples: Samples that were processed.
        num_steps: Steps.
        num_tokens: Tokens.

    Returns:
        ``<split>_runtime`` in seconds, and rates for what was counted.
    """
    runtime = time.time() - start_time
    rates = {"samples": num_samples, "steps": num_steps, "tokens": num_tokens}
    measured = {f"{split}_runtime": round(runtime, 4)}
    if runtime > 0:
        for name, number in rates.items():
            if number is not None:
                measured[f"{split}_{name}_per_second"] = round(number / runtime, 3)
    return measured
