"""The arguments of a trainer."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from forgather.ml.trainer import derived
from forgather.ml.trainer.accelerator_config import AcceleratorConfig
from forgather.ml.trainer.fields.compute import Compute
from forgather.ml.trainer.fields.describing import does
from forgather.ml.trainer.fields.own import Own, OwnSaving
from forgather.ml.trainer.fields.running import Parallel, Running, Scripts
from forgather.ml.trainer.fields.training import Training
from forgather.ml.trainer.fields.watching import Evaluation, Logging, Saving
from forgather.ml.trainer.legacy import Translating, UnknownArgumentError, translated, unknown
from forgather.ml.trainer.process import Place
from forgather.ml.trainer.refusals import REFUSED, Refusal, refuse_unhonoured
from forgather.ml.trainer.setters import Setters
from forgather_fn.signature import shown


# A dataclass takes its fields from its bases last to first: Training's come first, as in transformers.
@dataclass(repr=False)
class TrainingArguments(
    Place,
    Setters,
    OwnSaving,
    Own,
    Scripts,
    Parallel,
    Running,
    Saving,
    Evaluation,
    Logging,
    Compute,
    Training,
    metaclass=Translating,
):
    """Everything that a trainer is told, as a mutable dataclass: transformers' 114 fields, and Forgather's own.

    Defaults, derived values and errors are those of transformers 5.23; names of version 4 are accepted with a warning.
    What a field does is its ``help``: :func:`forgather.ml.trainer.refusals.table` lists them all. A value that is not
    honoured is refused when the arguments are made, and once more by ``train``, which reads them anew.

    Making one touches no file and starts no process.

    Raises:
        ValueError: Arguments contradict each other, or one of them is not honoured.

    Example:
        >>> args = TrainingArguments("runs/a", learning_rate=1e-4, eval_strategy="epoch")
        >>> args.do_eval, args.lr_scheduler_type.value, args.get_warmup_steps(100)
        (True, 'linear', 0)
    """

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED
    """What the trainer of this class does not honour."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
        "lr_scheduler_kwargs",
    ]
    """Fields that may be given as JSON; users' subclasses add theirs."""

    def __post_init__(self) -> None:
        """Derive, check, and refuse."""
        derived.normalise(self)
        derived.derive(self)
        derived.validate(self)
        self.mixed_precision = derived.mixed_precision(self)
        derived.derive_device(self)
        refuse_unhonoured(self)

    def __str__(self) -> str:
        shown = {name: f"<{name.upper()}>" if name.endswith("_token") else v for name, v in asdict(self).items()}
        return f"{type(self).__name__}(\n" + "".join(f"{name}={shown[name]},\n" for name in sorted(shown)) + ")"

    __repr__ = __str__

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Count the updates of the warm-up: ``warmup_steps``, or its share of all updates, rounded up."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        """Give all fields as JSON can hold them, but for tokens, which are left out."""
        return {one.name: _plain(one.name, getattr(self, one.name)) for one in fields(self) if one.init}

    def to_json_string(self) -> str:
        """Give all fields as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Give all fields as TensorBoard's hparams can hold them: numbers, texts and tensors."""
        values = self.to_dict() | {"train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {name: v if type(v) in (bool, int, float, str, torch.Tensor) else str(v) for name, v in values.items()}


def _plain(name: str, value: Any) -> Any:
    if name.endswith("_token"):
        return f"<{name.upper()}>"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, AcceleratorConfig) or hasattr(value, "to_diff_dict"):
        return value.to_dict()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: _plain("", inner) for key, inner in value.items()}
    return [_plain("", inner) for inner in value] if isinstance(value, list) else value


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """The arguments of a trainer that evaluates by generating."""

    sortish_sampler: bool = field(default=False, metadata=does("Refused: transformers has no such sampler any more."))
    predict_with_generate: bool = field(default=False, metadata=does("Predict what the model generates."))
    generation_max_length: int | None = field(
        default=None, metadata=does("max_length of generation; None: the model's.")
    )
    generation_num_beams: int | None = field(default=None, metadata=does("num_beams of generation; None: the model's."))
    generation_config: str | Path | Any | None = field(
        default=None, metadata=does("A GenerationConfig, or the directory of one; None: the model's.")
    )

    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "sortish_sampler": Refusal("it was for a data set class that transformers no longer has"),
    }


Args = TypeVar("Args", bound=TrainingArguments)


def arguments_from(given: Any, kind: type[Args] = TrainingArguments) -> Args:  # type: ignore[assignment]  # its own bound
    """Make arguments of what a trainer is given.

    Args:
        given: None, a dict, arguments of this class (which are returned as they are), or an instance of transformers'
            own ``TrainingArguments``, whose fields are copied. What users add to that class becomes attributes.
        kind: The class to make.

    Raises:
        UnknownArgumentError: A key of the dict is no argument; the nearest one is named.
        ValueError: It is none of these, or an argument is not honoured.

    Example:
        >>> arguments_from({"learning_rate": 1e-4}).learning_rate
        0.0001
    """
    if given is None:
        return kind("tmp_trainer")
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return kind(**given)
    if not is_dataclass(given) or isinstance(given, type) or not hasattr(given, "output_dir"):
        raise ValueError(
            f"args={shown(given)}: expected a {kind.__name__}, a dict of its fields, or transformers' own "
            "TrainingArguments"
        )
    values = {one.name: getattr(given, one.name) for one in fields(given) if one.init}
    own = {one.name for one in fields(kind) if one.init}
    made = kind(**{name: value for name, value in values.items() if name in own})
    for name in values.keys() - own:
        setattr(made, name, values[name])
    return made


__all__ = [
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "UnknownArgumentError",
    "arguments_from",
    "translated",
    "unknown",
]
