"""What arguments make of each other: their normal forms, and which of them contradict each other.

The rules, their order, and most messages are those of transformers 5.23, so that a script gets the error that it knows.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from forgather.ml.trainer.accelerator_config import accelerator_config
from forgather.ml.trainer.enums import (
    DebugOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
)
from forgather.ml.trainer.optimizers import optim_args
from forgather.ml.trainer.reporting import report_names

if TYPE_CHECKING:
    from forgather.ml.trainer.arguments import TrainingArguments

NEEDS_METRIC: Final = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""Schedules that follow an evaluated metric."""


def normalise(args: "TrainingArguments") -> None:
    """Bring arguments to their normal forms: parsed, expanded, as members of their enumerations."""
    args.output_dir = os.path.expanduser("trainer_output" if args.output_dir is None else args.output_dir)
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            setattr(args, name, typed(json.loads(value)))
    _activation_checkpointing(args)
    if args.disable_tqdm is None:
        # transformers' logger is the one whose level its users set to get rid of bars.
        args.disable_tqdm = logging.getLogger("transformers").getEffectiveLevel() > logging.WARNING
    if isinstance(args.include_num_input_tokens_seen, bool):
        args.include_num_input_tokens_seen = "all" if args.include_num_input_tokens_seen else "no"
    args.eval_strategy = IntervalStrategy(args.eval_strategy)
    args.logging_strategy = IntervalStrategy(args.logging_strategy)
    args.save_strategy = SaveStrategy(args.save_strategy)
    args.hub_strategy = HubStrategy(args.hub_strategy)
    args.lr_scheduler_type = SchedulerType(args.lr_scheduler_type)
    args.optim = OptimizerNames(args.optim)
    words = args.debug.split() if isinstance(args.debug, str) else args.debug or []
    args.debug = [DebugOption(word) for word in words]
    if args.logging_dir is not None:
        args.logging_dir = os.path.expanduser(args.logging_dir)


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """Read the numbers and truth values that stand in strings, as a command line passes them.

    Example:
        >>> typed({"use_reentrant": "False", "num_cycles": "2", "inner": {"power": "0.5"}})
        {'use_reentrant': False, 'num_cycles': 2, 'inner': {'power': 0.5}}
    """

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return typed(value)
        if not isinstance(value, str):
            return value
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value.isdigit():
            return int(value)
        return float(value) if value.replace(".", "", 1).isdigit() else value

    return {name: read(value) for name, value in values.items()}


def _activation_checkpointing(args: "TrainingArguments") -> None:
    """Take the older names where the newer ones are not given; then both say the same."""
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(args, new) is None and getattr(args, old) is not None:
            warnings.warn(f"`{old}` is deprecated. Use `{new}` instead.", FutureWarning, stacklevel=6)
            setattr(args, new, getattr(args, old))
        setattr(args, old, getattr(args, new))
    if args.activation_checkpointing is None:
        args.activation_checkpointing = args.gradient_checkpointing = False


def derive(args: "TrainingArguments") -> None:
    """Fill in what follows from other arguments."""
    if args.eval_strategy != IntervalStrategy.NO:
        args.do_eval = True
    if args.eval_strategy == IntervalStrategy.STEPS and not args.eval_steps:
        if args.logging_steps <= 0:
            raise ValueError(
                f"evaluation strategy {args.eval_strategy} requires either non-zero --eval_steps or --logging_steps"
            )
        args.eval_steps = args.logging_steps
    compares = args.load_best_model_at_end or args.preserve_best_model or args.lr_scheduler_type in NEEDS_METRIC
    if compares and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.greater_is_better is None and args.metric_for_best_model is not None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    args.report_to = report_names(args.report_to)


def mixed_precision(args: "TrainingArguments") -> str:
    """Name the precision of autocast: ``no``, ``bf16`` or ``fp16``; Accelerate's launcher may name one."""
    if args.fp16 or args.bf16:
        return "fp16" if args.fp16 else "bf16"
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def derive_device(args: "TrainingArguments") -> None:
    """Fill in what follows from the device and the compiler."""
    if args.torch_compile_mode is not None or args.torch_compile_backend is not None:
        args.torch_compile = True
    if args.torch_compile and args.torch_compile_backend is None:
        args.torch_compile_backend = "inductor"
    args.accelerator_config = accelerator_config(args.accelerator_config)  # type: ignore[assignment]  # as there
    if args.tf32 and not _has_tf32():
        raise ValueError("--tf32 requires Ampere or a newer GPU arch, cuda>=11 and torch>=1.7")
    if args.use_cpu:
        args.dataloader_pin_memory = False


def _has_tf32() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).major >= 8


def validate(args: "TrainingArguments") -> None:
    """Refuse arguments that contradict each other.

    Raises:
        ValueError: Says which, and what was given.
    """
    for check in _CHECKS:
        check(args)


def _intervals(args: "TrainingArguments") -> None:
    steps = IntervalStrategy.STEPS
    if args.torch_empty_cache_steps is not None and not (
        isinstance(args.torch_empty_cache_steps, int) and args.torch_empty_cache_steps > 0
    ):
        raise ValueError(
            f"`torch_empty_cache_steps` must be an integer bigger than 0, got {args.torch_empty_cache_steps}."
        )
    if args.logging_strategy == steps and args.logging_steps == 0:
        raise ValueError(f"logging strategy {args.logging_strategy} requires non-zero --logging_steps")
    for name in ("logging", "eval", "save"):
        interval = getattr(args, f"{name}_steps")
        if getattr(args, f"{name}_strategy") == steps.value and interval > 1:
            if interval != int(interval):
                raise ValueError(f"--{name}_steps must be an integer if bigger than 1: {interval}")
            setattr(args, f"{name}_steps", int(interval))


def _best_model(args: "TrainingArguments") -> None:
    if not args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        return
    assert isinstance(args.eval_strategy, IntervalStrategy)
    if args.eval_strategy.value != args.save_strategy:
        raise ValueError(
            "--load_best_model_at_end requires the save and eval strategy to match, except when "
            f'--save_strategy="best", but found\n- Evaluation strategy: {args.eval_strategy}\n'
            f"- Save strategy: {args.save_strategy}"
        )
    if args.eval_strategy != IntervalStrategy.STEPS:
        return
    assert args.eval_steps is not None
    scale = 1
    if args.eval_steps < 1 or args.save_steps < 1:
        if not (args.eval_steps < 1 and args.save_steps < 1):
            raise ValueError(
                "--load_best_model_at_end requires the saving steps to be a multiple of the evaluation steps, which "
                "cannot get guaranteed when mixing ratio and absolute steps for save_steps "
                f"{args.save_steps} and eval_steps {args.eval_steps}."
            )
        scale = 1_000_000  # 0.2 % 0.1 is not 0
    if round(args.save_steps * scale) % round(args.eval_steps * scale) != 0:
        raise ValueError(
            "--load_best_model_at_end requires the saving steps to be a round multiple of the evaluation steps, but "
            f"found {args.save_steps}, which is not a round multiple of {args.eval_steps}."
        )


def _precision(args: "TrainingArguments") -> None:
    if (args.bf16 or args.bf16_full_eval) and not args.use_cpu and not _has_bfloat16():
        more = " You need Ampere+ GPU with cuda>=11.0." if torch.cuda.is_available() else ""
        raise ValueError(
            "Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the model on CPU."
            + more
        )
    if args.fp16 and args.bf16:
        raise ValueError("At most one of fp16 and bf16 can be True, but not both")
    if args.fp16_full_eval and args.bf16_full_eval:
        raise ValueError("At most one of fp16 and bf16 can be True for full eval, but not both")


def _has_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return torch.accelerator.is_available()


def _optimizer(args: "TrainingArguments") -> None:
    assert isinstance(args.optim, OptimizerNames)
    optim_args(args.optim, args.optim_args)


def _schedule(args: "TrainingArguments") -> None:
    if args.lr_scheduler_type in NEEDS_METRIC and args.eval_strategy == IntervalStrategy.NO:
        assert isinstance(args.lr_scheduler_type, SchedulerType)
        raise ValueError(f"lr_scheduler_type {args.lr_scheduler_type.value} requires an eval strategy")
    if args.warmup_steps < 0:
        raise ValueError(f"Got warmup_steps = {args.warmup_steps}, Expected value warmup_steps >= 0")


def _data(args: "TrainingArguments") -> None:
    if args.dataloader_num_workers == 0 and args.dataloader_prefetch_factor is not None:
        raise ValueError(
            "--dataloader_prefetch_factor can only be set when data is loaded in a different process, i.e. when "
            "--dataloader_num_workers > 0."
        )
    if args.train_sampling_strategy not in (known := ["random", "sequential", "group_by_length", "batch_rebalance"]):
        raise ValueError(f"train_sampling_strategy={args.train_sampling_strategy!r} is not one of {known}")
    if args.include_num_input_tokens_seen not in (known := ["all", "non_padding", "no"]):
        raise ValueError(f"include_num_input_tokens_seen={args.include_num_input_tokens_seen!r} is not one of {known}")
    if extra := set(args.include_for_metrics) - {"inputs", "loss"}:
        raise ValueError(f"include_for_metrics has {sorted(extra)}: expected 'inputs', 'loss', or both")


def _positive(args: "TrainingArguments") -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)!r}: expected at least 1")
    for name, top in (("label_smoothing_factor", 1.0), ("activation_memory_budget", 1.0)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= top:
            raise ValueError(f"{name}={value!r}: expected a number from 0 to {top:g}")


def _own(args: "TrainingArguments") -> None:
    for name, known in _WORDS.items():
        if getattr(args, name) not in known:
            raise ValueError(f"{name}={getattr(args, name)!r} is not one of {list(known)}")
    kernels = [args.sdpa_backend] if isinstance(args.sdpa_backend, str) else args.sdpa_backend or []
    if extra := set(kernels) - {"math", "flash", "efficient", "cudnn"}:
        raise ValueError(f"sdpa_backend has {sorted(extra)}: expected math, flash, efficient, cudnn")
    if args.activation_memory_budget is not None and not args.torch_compile:
        raise ValueError("activation_memory_budget is a setting of the compiler: set torch_compile=True with it")
    if args.fuse_optim_with_backward:
        for name, off in (("max_grad_norm", (0, None)), ("gradient_accumulation_steps", (1,)), ("fp16", (False,))):
            if getattr(args, name) not in off:
                raise ValueError(
                    f"fuse_optim_with_backward updates each parameter before the gradient is whole, so that "
                    f"{name}={getattr(args, name)!r} is not possible: set {name}={off[0]!r}"
                )
    if args.preserve_n_best < 1:
        raise ValueError(f"preserve_n_best={args.preserve_n_best!r}: expected at least 1")
    if args.default_dtype is not None and not isinstance(getattr(torch, str(args.default_dtype), None), torch.dtype):
        raise ValueError(f"default_dtype={args.default_dtype!r} is not the name of a data type of torch")


_WORDS: Final[dict[str, tuple[str | None, ...]]] = {
    "construct_model_on": ("default", "device", "meta"),
    "on_nonfinite": ("raise", "skip"),
    "float32_matmul_precision": (None, "highest", "high", "medium"),
    "dataloader_multiprocessing_context": (None, "fork", "spawn", "forkserver"),
}

_CHECKS: Final[tuple[Callable[["TrainingArguments"], None], ...]] = (
    _intervals,
    _best_model,
    _precision,
    _optimizer,
    _schedule,
    _data,
    _positive,
    _own,
)
