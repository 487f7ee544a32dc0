"""Arguments of transformers 4 and of Forgather that have another name now.

Each is accepted as a keyword argument of ``TrainingArguments`` and of what users derive from it, with a warning that
names the new one. An argument that has no successor is accepted with the value that it had by default, and refused with
any other.
"""

import difflib
import inspect
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Final

Values = dict[str, Any]
Translation = Callable[[str, Any, Values], str]
"""``(name, value, arguments) -> what to write instead``: puts the value where it belongs now."""


class UnknownArgumentError(TypeError, ValueError):
    """A name that is no argument: a TypeError, as of any call, and a ValueError, as of a dict that is read."""


def renamed(new: str) -> Translation:
    """Pass the value on under another name."""

    def translate(name: str, value: Any, values: Values) -> str:
        if new in values and values[new] != value:
            raise ValueError(f"{name}={value!r} and {new}={values[new]!r} are one argument: give {new} alone")
        values[new] = value
        return new

    return translate


def switched(new: str, to: Any) -> Translation:
    """Set another argument where the old one is true."""

    def translate(name: str, value: Any, values: Values) -> str:
        if value:
            values[new] = to
        return f"{new}={to!r}"

    return translate


def retired(*harmless: Any, reason: str) -> Translation:
    """Accept what was the default, and refuse the rest."""

    def translate(name: str, value: Any, values: Values) -> str:
        if value not in harmless:
            raise ValueError(f"{name}={value!r} is not supported: {reason}")
        return f"nothing: {reason}"

    return translate


def kept(advice: str) -> Translation:
    """Keep an argument that left transformers and is a field here."""

    def translate(name: str, value: Any, values: Values) -> str:
        values[name] = value
        return advice

    return translate


def _warmup_ratio(name: str, value: Any, values: Values) -> str:
    # In version 4 a number of steps overrode the share.
    if not 0 <= value <= 1:
        raise ValueError(f"warmup_ratio={value!r}: expected a share of all updates, from 0 to 1")
    if not values.get("warmup_steps") and value:
        if value == 1:
            raise ValueError("warmup_ratio=1 warms up all the run: give warmup_steps, the number of updates")
        values["warmup_steps"] = value
    return "warmup_steps"


def _include_inputs(name: str, value: Any, values: Values) -> str:
    if value:
        values["include_for_metrics"] = [*values.get("include_for_metrics", []), "inputs"]
    return "include_for_metrics=['inputs']"


def _accelerator(name: str, value: Any, values: Values) -> str:
    config = values.get("accelerator_config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}={value!r} and accelerator_config={config!r}: write both into accelerator_config")
    values["accelerator_config"] = {**config, name: value}
    return f"accelerator_config={{{name!r}: ...}}"


def _device(name: str, value: Any, values: Values) -> str:
    kind = str(value).partition(":")[0]
    if kind == "cpu":
        values["use_cpu"] = True
    elif value is not None:
        raise ValueError(f"device={value!r}: the accelerator is found; choose one with CUDA_VISIBLE_DEVICES")
    return "use_cpu=True"


def _mixed_precision(name: str, value: Any, values: Values) -> str:
    if value not in (None, "no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision={value!r}: expected None, 'no', 'bf16' or 'fp16'")
    if value in ("bf16", "fp16"):
        values[value] = True
    return "bf16=True or fp16=True"


OLD: Final[Mapping[str, Translation]] = {
    "evaluation_strategy": renamed("eval_strategy"),
    "warmup_ratio": _warmup_ratio,
    "no_cuda": renamed("use_cpu"),
    "logging_dir": kept("the environment variable TENSORBOARD_LOGGING_DIR, or go on with logging_dir here"),
    "overwrite_output_dir": kept("nothing: trainers never read it, scripts did"),
    "save_safetensors": retired(True, reason="weights are saved as safetensors"),
    "group_by_length": switched("train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": _include_inputs,
    "include_tokens_per_second": switched("include_num_input_tokens_seen", "all"),
    "push_to_hub_model_id": renamed("hub_model_id"),
    "push_to_hub_token": renamed("hub_token"),
    "push_to_hub_organization": retired(None, reason="write it into hub_model_id, as 'organization/name'"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "adafactor": switched("optim", "adafactor"),
    "torchdynamo": renamed("torch_compile_backend"),
    "xpu_backend": renamed("ddp_backend"),
    "tpu_metrics_debug": switched("debug", "tpu_metrics_debug"),
    "dispatch_batches": _accelerator,
    "split_batches": _accelerator,
    "half_precision_backend": retired("auto", "cuda_amp", "cpu_amp", reason="torch's autocast is used"),
    "fp16_backend": retired("auto", "amp", reason="torch's autocast is used"),
    "fp16_opt_level": retired("O1", None, reason="it is Apex's, and torch's autocast is used"),
    "use_mps_device": retired(True, False, reason="the accelerator is found; use_cpu=True keeps off it"),
    "use_ipex": retired(False, reason="torch's own kernels are used"),
    "jit_mode_eval": retired(False, reason="set torch_compile=True instead"),
    "past_index": retired(-1, None, reason="write the loop over segments in compute_loss"),
    "use_legacy_prediction_loop": retired(False, reason="there is one evaluation loop"),
    "tpu_num_cores": retired(None, reason="TPUs are not supported"),
    "ray_scope": retired("last", None, reason="it belongs to hyperparameter_search, which is not supported"),
    "mp_parameters": retired("", None, reason="SageMaker's model parallelism is not supported"),
    "sharded_ddp": retired("", None, False, reason="it is FairScale's; see fsdp"),
    "fsdp_min_num_params": retired(0, None, reason="write it into fsdp_config, as 'min_num_params'"),
    "fsdp_transformer_layer_cls_to_wrap": retired(None, reason="write it into fsdp_config"),
}
"""What transformers 4 had, and 5 has not."""

FORGATHER: Final[Mapping[str, Translation]] = {
    "best_model_metric": renamed("metric_for_best_model"),
    "best_model_greater_is_better": renamed("greater_is_better"),
    "mixed_precision": _mixed_precision,
    "pipeline_chunks": renamed("n_microbatches"),
    "device": _device,
    "gc_threshold": retired(
        0.5, None, reason="set PYTORCH_CUDA_ALLOC_CONF=garbage_collection_threshold:0.5 in the environment"
    ),
    "speed_metrics_start_step": retired(0, 1, None, reason="rates are those of the whole call"),
}
"""What Forgather's trainers spell in their own way; accepted without a warning, since nothing is to be changed."""


def translated(names: Iterable[str], given: Mapping[str, Any]) -> Values:
    """Bring keyword arguments to the names of today.

    Args:
        names: The fields that there are; one that users add under an old name is theirs, and is left alone.
        given: Keyword arguments.

    Raises:
        UnknownArgumentError: A name is none of them; the nearest one is shown.
        ValueError: An old argument has a value that cannot be honoured, or contradicts the new one.
    """
    known = set(names)
    values = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        own = name in known and name not in ("logging_dir", "overwrite_output_dir")
        if own or (name in known and not value):
            continue
        translate = OLD.get(name) or FORGATHER.get(name)
        if translate is None:
            raise UnknownArgumentError(unknown(name, [*known, *OLD, *FORGATHER]))
        instead = translate(name, value, values)
        if values.keys() - known:  # a word of another trainer's arguments
            raise UnknownArgumentError(unknown(name, [*known, *OLD]))
        if name in OLD:
            warnings.warn(
                f"{name} is an argument of transformers 4. Instead of it, write {instead}.",
                FutureWarning,
                stacklevel=3,  # this function < Translating.__call__ < the user's line
            )
    return values


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that a name is no argument, and which it may have been meant for."""
    names = list(known)
    elsewhere = ELSEWHERE.get(name)
    near = [elsewhere] if elsewhere in names else difflib.get_close_matches(name, names, n=1)
    return f"there is no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")


ELSEWHERE: Final[Mapping[str, str]] = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "gradient_clip_val": "max_grad_norm",
    "num_workers": "dataloader_num_workers",
    "warmup": "warmup_steps",
}
"""Names that other libraries have for these arguments, which are too unlike to be found by their letters."""


class Translating(ABCMeta):
    """The class of dataclasses whose constructors take old names too, those that users derive from them included.

    A dataclass writes its own ``__init__`` for each subclass, so what surrounds the constructor is the one place where
    old names can be translated for all of them. It is an ``ABCMeta``, so that abstract classes can be mixed in.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, as editors show it; without this, that of ``__call__`` would be found."""
        _, *rest = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]  # of this very class
        return inspect.Signature(rest)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance."""
        every = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]  # it is a dataclass
        return super().__call__(*args, **translated(every, kwargs))
