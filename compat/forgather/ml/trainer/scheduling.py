"""The learning-rate schedules that arguments name, as live schedulers of torch.

A trainer's ``lr_scheduler`` is an object that users read, step and save, so a schedule is put into torch's
``LambdaLR``. What multiplies the rate is a ``functools.partial`` with the keyword arguments that transformers' own
factories use, since people look at these.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from forgather.ml.trainer import shapes
from forgather.ml.trainer.enums import SchedulerType
from forgather.ml.trainer.legacy import UnknownArgumentError, unknown
from forgather_fn.schedules import Schedule, rate

Keywords = dict[str, Any]


def lr_lambda(shape: Callable[..., Schedule], keywords: Keywords) -> Callable[[int], float]:
    """Make what ``LambdaLR`` multiplies the rate by.

    Args:
        shape: Of :mod:`~forgather.ml.trainer.shapes`.
        keywords: What it takes; they can be read from the result as ``.keywords``.
    """
    made = shape(**keywords)

    def at(current_step: int, **ignored: Any) -> float:
        return rate(made, current_step)

    return functools.partial(at, **keywords)


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: int = 0,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: Mapping[str, Any] | None = None,
) -> LRScheduler | Any:
    """Make the scheduler of a name, as transformers' function of this name does.

    Args:
        name: One of ``SchedulerType``.
        optimizer: Whose rates it sets.
        num_warmup_steps: Updates in which the rate rises.
        num_training_steps: All updates; where it is None, only schedules without an end can be made.
        scheduler_specific_kwargs: ``lr_scheduler_kwargs`` of the arguments.

    Raises:
        UnknownArgumentError: The schedule does not take one of the arguments.
        ValueError: An argument is missing, or has a value that is not possible.
    """
    kind = SchedulerType(name)
    specific = dict(scheduler_specific_kwargs or {})
    if kind == SchedulerType.REDUCE_ON_PLATEAU:
        _check_known(kind, ReduceLROnPlateau, specific)
        return ReduceLROnPlateau(optimizer, **specific)
    if kind == SchedulerType.GREEDY:
        return _greedy(optimizer, specific)
    shape, complete = KINDS[kind]
    known = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    _check_known(kind, complete, specific)
    keywords = complete(optimizer.defaults["lr"], **known, **specific)
    return LambdaLR(optimizer, lr_lambda(shape, keywords))


def _greedy(optimizer: Optimizer, specific: Keywords) -> Any:
    try:
        from transformers.optimization import GreedyLR
    except ImportError as error:
        raise ValueError("lr_scheduler_type='greedy' is a class of transformers, which is not installed") from error
    _check_known(SchedulerType.GREEDY, GreedyLR, specific)
    return GreedyLR(optimizer, **specific)


def _check_known(kind: SchedulerType, takes: Callable[..., Any], specific: Keywords) -> None:
    names = [name for name in inspect.signature(takes).parameters if name not in _OURS]
    for name in specific:
        if name not in names:
            raise UnknownArgumentError(
                f"lr_scheduler_kwargs of {kind.value!r}: {unknown(name, names)} It takes {', '.join(names) or 'none'}."
            )


_OURS: Final = ("lr", "num_warmup_steps", "num_training_steps", "optimizer")


def _total(num_training_steps: int | None) -> int:
    if num_training_steps is None:
        raise ValueError("this schedule ends with the run: set max_steps, since the length of the data is not known")
    return num_training_steps


# Each completes the keyword arguments of a shape: the names and defaults are those of transformers' factories.


def _linear(lr: float, num_warmup_steps: int, num_training_steps: int | None) -> Keywords:
    return {"num_warmup_steps": num_warmup_steps, "num_training_steps": _total(num_training_steps)}


def _cosine(lr: float, num_warmup_steps: int, num_training_steps: int | None, num_cycles: float = 0.5) -> Keywords:
    return _linear(lr, num_warmup_steps, num_training_steps) | {"num_cycles": num_cycles}


def _restarts(lr: float, num_warmup_steps: int, num_training_steps: int | None, num_cycles: int = 1) -> Keywords:
    return _linear(lr, num_warmup_steps, num_training_steps) | {"num_cycles": num_cycles}


def _polynomial(
    lr: float, num_warmup_steps: int, num_training_steps: int | None, lr_end: float = 1e-7, power: float = 1.0
) -> Keywords:
    if not lr > lr_end:
        raise ValueError(f"lr_end ({lr_end}) must be smaller than initial lr ({lr})")
    keywords = _linear(lr, num_warmup_steps, num_training_steps)
    return keywords | {"lr_end": lr_end, "power": power, "lr_init": lr}


def _constant(lr: float, num_warmup_steps: int, num_training_steps: int | None) -> Keywords:
    return {"num_warmup_steps": 0}


def _constant_with_warmup(lr: float, num_warmup_steps: int, num_training_steps: int | None) -> Keywords:
    return {"num_warmup_steps": num_warmup_steps}


def _inverse_sqrt(
    lr: float, num_warmup_steps: int, num_training_steps: int | None, timescale: int | None = None
) -> Keywords:
    return {"num_warmup_steps": num_warmup_steps, "timescale": timescale or num_warmup_steps or 10_000}


def _min_lr(
    lr: float,
    num_warmup_steps: int,
    num_training_steps: int | None,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Keywords:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(
            f"min_lr={min_lr!r}, min_lr_rate={min_lr_rate!r}: One of min_lr or min_lr_rate should be set through the "
            "`lr_scheduler_kwargs`, and only one"
        )
    least = min_lr / lr if min_lr is not None else min_lr_rate
    return _cosine(lr, num_warmup_steps, num_training_steps, num_cycles) | {"min_lr_rate": least}


def _min_lr_warmed(
    lr: float,
    num_warmup_steps: int,
    num_training_steps: int | None,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Keywords:
    keywords = _min_lr(lr, num_warmup_steps, num_training_steps, num_cycles, min_lr, min_lr_rate)
    return keywords | {"warmup_lr_rate": warmup_lr_rate}


def _wsd(
    lr: float,
    num_warmup_steps: int,
    num_training_steps: int | None,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> Keywords:
    if num_decay_steps is None:
        raise ValueError("lr_scheduler_type='warmup_stable_decay' needs lr_scheduler_kwargs={'num_decay_steps': ...}")
    for name, given in (("warmup", warmup_type), ("decay", decay_type)):
        if given not in shapes.CURVES:
            raise ValueError(f"Unknown {name} type: {given}, expected 'linear', 'cosine' or '1-sqrt'")
    if num_training_steps is not None and num_stable_steps is not None:
        warnings.warn(
            "Both num_training_steps and num_stable_steps are specified. num_stable_steps will be used.", stacklevel=4
        )
    if num_stable_steps is None:
        num_stable_steps = _total(num_training_steps) - num_warmup_steps - num_decay_steps
    return {
        "num_warmup_steps": num_warmup_steps,
        "num_stable_steps": num_stable_steps,
        "num_decay_steps": num_decay_steps,
        "warmup_type": warmup_type,
        "decay_type": decay_type,
        "min_lr_ratio": min_lr_ratio,
        "num_cycles": num_cycles,
    }


KINDS: Final[Mapping[SchedulerType, tuple[Callable[..., Schedule], Callable[..., Keywords]]]] = {
    SchedulerType.LINEAR: (shapes.linear, _linear),
    SchedulerType.COSINE: (shapes.cosine, _cosine),
    SchedulerType.COSINE_WITH_RESTARTS: (shapes.cosine_with_restarts, _restarts),
    SchedulerType.POLYNOMIAL: (shapes.polynomial, _polynomial),
    SchedulerType.CONSTANT: (shapes.constant_with_warmup, _constant),
    SchedulerType.CONSTANT_WITH_WARMUP: (shapes.constant_with_warmup, _constant_with_warmup),
    SchedulerType.INVERSE_SQRT: (shapes.inverse_sqrt, _inverse_sqrt),
    SchedulerType.COSINE_WITH_MIN_LR: (shapes.cosine, _min_lr),
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: (shapes.cosine_warmup_with_min_lr, _min_lr_warmed),
    SchedulerType.WARMUP_STABLE_DECAY: (shapes.warmup_stable_decay, _wsd),
}
"""The schedules that depend on the step alone: their shapes, and what completes the arguments of these."""
