"""The recipe of a training run."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import attrs
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from forgather_fn.average import Average
from forgather_fn.describe import describe
from forgather_fn.losses import Loss, Objective
from forgather_fn.model import ModelFactory, class_of
from forgather_fn.optim import Optimizer
from forgather_fn.reducers import Control
from forgather_fn.schedules import Reactive, Schedule
from forgather_fn.schedules.base import rate
from forgather_fn.signature import checked_fields, shown
from forgather_fn.transforms import Transform
from forgather_fn.workspace import VIEWED_ELEMENTS

Precision = Literal["as_built", "float32", "float64", "bfloat16", "float16"]


def _one_of(*choices: Any) -> Callable[[Any, "attrs.Attribute[Any]", Any], None]:
    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError(f"Plan: {attribute.name}={value!r} is not one of {', '.join(map(repr, choices))}")

    return check


def _is_ours(value: Any, package: str = "") -> bool:
    """Tell whether a value is a function of this library, which makes what a plan takes."""
    return inspect.isfunction(value) and value.__module__.startswith(f"forgather_fn.{package}")


def _truth(instance: Any, attribute: "attrs.Attribute[bool]", value: bool) -> None:
    if type(value) is not bool:
        raise ValueError(f"Plan: {attribute.name} must be True or False, got {shown(value)}")


def _at_least_one(instance: Any, attribute: "attrs.Attribute[int]", value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Plan: {attribute.name} must be an integer of at least 1, got {value!r}")


def _is_count(instance: Any, attribute: "attrs.Attribute[int]", value: int) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"Plan: {attribute.name} must be an integer of at least 0, got {value!r}")


def _is_backend(instance: Any, attribute: "attrs.Attribute[str]", value: Any) -> None:
    if not (isinstance(value, str) or callable(value)):
        raise ValueError(
            f"Plan: backend takes the name of a compiler, such as 'inductor', or a function; got {value!r}"
        )


def _transforms(value: Iterable[Transform]) -> tuple[Transform, ...]:
    if isinstance(value, Transform):
        raise ValueError(f"Plan: transforms takes a sequence of them: transforms=({value!r},)")
    given = tuple(value) if isinstance(value, Iterable) else (value,)
    for one in given:
        if not isinstance(one, Transform):
            made = "; this makes one, when it is called" if _is_ours(one) else ""
            raise ValueError(f"Plan: transforms takes Transforms such as ff.clipped(1.0), got {describe(one)}{made}")
    return given


def _is_optimizer(instance: Any, attribute: "attrs.Attribute[Optimizer]", value: Any) -> None:
    if not isinstance(value, Optimizer):
        raise ValueError(
            f"Plan: optimizer={describe(value)} is not one of this library's: use ff.adamw(), ff.adam(), ff.sgd(), or "
            "adapt one of torch with ff.from_torch(lambda groups: torch.optim.RMSprop(groups))"
        )


def _is_loss(instance: Any, attribute: "attrs.Attribute[Loss]", value: Any) -> None:
    uncalled = _is_ours(value, "losses.")
    foreign = isinstance(value, nn.Module) or getattr(value, "__module__", "") == "torch.nn.functional"
    if foreign or not callable(value) or uncalled:
        raise ValueError(
            f"Plan: loss={describe(value)} is not a function of (outputs, batch) that gives a Mean: use one of "
            "ff.losses, such as ff.losses.cross_entropy, or write one"
            + ("; this makes one, when it is called" if uncalled else "")
        )


def _is_schedule(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    if isinstance(value, type | LRScheduler):
        raise ValueError(
            f"Plan: schedule={describe(value)} is not a function of the step that gives a learning rate: use one of "
            "ff.schedules, such as ff.schedules.cosine(peak=3e-4, total=1000), or write one: "
            "schedule=lambda step: 0.1 * 0.5 ** (step // 30)"
        )
    if not (callable(value) or isinstance(value, Reactive)):  # what a function gives is looked at by a step
        rate(value, 0)


def _is_average(instance: Any, attribute: "attrs.Attribute[Average | None]", value: Any) -> None:
    if not isinstance(value, Average | None):
        made = "; this makes one, when it is called" if _is_ours(value) else ""
        raise ValueError(f"Plan: average takes one such as ff.ema(0.999), got {describe(value)}{made}")


def _check_compiles(plan: "Plan") -> None:
    parts: list[Optimizer | Transform] = [plan.optimizer, *plan.transforms]
    for part in parts:
        if not part.compiles:
            raise ValueError(
                f"Plan: {part!r} works on the host and cannot be a part of a compiled step; use "
                'compile="model", which compiles the model alone'
            )


def _check_couples(plan: "Plan") -> None:
    if plan.microbatches > 1 and isinstance(plan.loss, Objective) and plan.loss.couples:
        raise ValueError(
            f"Plan: microbatches={plan.microbatches}, but {plan.loss!r} cannot be taken apart: {plan.loss.couples}"
        )


def _check_in_backward(plan: "Plan") -> None:
    why = {
        "compile=True": (plan.compile is True, "a compiled step is one graph, which lets go of gradients by itself"),
        "transforms": (bool(plan.transforms), "they are given the gradient of all parameters, as clipping needs it"),
        "microbatches": (plan.microbatches > 1, "their gradients are added before the update"),
        'accumulate="float32"': (plan.accumulate == "float32", "there is nothing to add"),
        'precision="float16"': (plan.precision == "float16", "an overflow is known when all gradients are there"),
        'on_nonfinite="skip"': (plan.on_nonfinite == "skip", "what has been updated already cannot be left out"),
        repr(plan.optimizer): (not plan.optimizer.separable, "it is not known to update parameters one by one"),
    }
    for what, (given, reason) in why.items():
        if given:
            raise ValueError(
                f'Plan: update="in_backward" updates each parameter as soon as its gradient is there, and cannot be '
                f"with {what}: {reason}"
            )


def _device(value: str | torch.device) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Plan: device {str(value)!r} cannot be used here: {reason}") from None
    return device


@checked_fields
@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """Everything that a training run is made of, before it runs. Frozen, and never saved itself: its description is.

    Attributes:
        model: A module, which keeps its values, or a function that builds one.
        loss: ``(outputs, batch) -> Mean``, or a mapping of named ones with ``"loss"`` among them.
        optimizer: Such as :func:`~forgather_fn.optim.adamw`.
        schedule: ``step -> learning rate``, or a constant; or one that reacts to results, such as
            :func:`~forgather_fn.schedules.on_plateau`.
        transforms: What gradients pass through, in order.
        average: A running average of the parameters, such as :func:`~forgather_fn.average.ema`.
        microbatches: Into how many parts a batch is cut; their gradients are added exactly.
        precision: ``"as_built"`` leaves the model's data types; ``"float32"`` and ``"float64"`` convert floating
            parameters, buffers and inputs; ``"bfloat16"`` and ``"float16"`` run forward and loss under autocast, the
            latter with a loss scale that adapts; see :mod:`~forgather_fn.scaling`.
        accumulate: In which data type the gradients of microbatches, and of processes, are added: ``"as_built"``, that
            of the parameters; or ``"float32"``, for parameters in half precision: the sum is rounded to their type
            once, and not at every addition. What one backward pass gives for one microbatch is in their type anyway.
        on_nonfinite: ``"raise"`` stops at the first step whose loss or gradient is not finite, ``"skip"`` leaves its
            update out and goes on. Either way nothing is changed by it. A gradient that overflows because a float16
            loss was scaled by too much is always skipped, and only the scale changed, as long as it can shrink.
        init: ``"as_built"``, or ``"by_name"``: module by module under keys of their names.
        donate: Let a step update its state in place. False copies first: the same bits, slower, and old states stay
            readable.
        device: Where it runs.
        update: ``"in_backward"`` updates each parameter as soon as its gradient is there, and lets go of that: less
            memory, the same bits as ``viewed_elements=0``; see :mod:`~forgather_fn.in_backward`.
        viewed_elements: Up to how many parameters gradients are views of a flat buffer: a matter of speed, and of the
            last bits, since sums are taken in another order.
        compile: True compiles the whole step (forward, backward, transforms, update) as one graph; ``"model"`` the
            model alone. Both give what the step gives that is not compiled, but for rounding and for other dropout
            masks.
        backend: Which compiler of ``torch.compile``.
        unroll: Compile all microbatches into one graph, where nothing random is drawn: a longer compilation, a faster
            step. Otherwise there are two, of a microbatch's gradient and of the update, since each microbatch has
            its own random key.
    """

    model: nn.Module | ModelFactory
    loss: Loss = attrs.field(validator=_is_loss)
    optimizer: Optimizer = attrs.field(validator=_is_optimizer)
    schedule: Schedule | Reactive | float = attrs.field(validator=_is_schedule)
    transforms: tuple[Transform, ...] = attrs.field(default=(), converter=_transforms)
    average: Average | None = attrs.field(default=None, validator=_is_average)
    microbatches: int = attrs.field(default=1, validator=_at_least_one)
    precision: Precision = attrs.field(
        default="as_built", validator=_one_of("as_built", "float32", "float64", "bfloat16", "float16")
    )
    accumulate: Literal["as_built", "float32"] = attrs.field(
        default="as_built", validator=_one_of("as_built", "float32")
    )
    on_nonfinite: Literal["raise", "skip"] = attrs.field(default="raise", validator=_one_of("raise", "skip"))
    init: Literal["as_built", "by_name"] = attrs.field(default="as_built", validator=_one_of("as_built", "by_name"))
    donate: bool = attrs.field(default=True, validator=_truth)
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=_device)
    update: Literal["after_backward", "in_backward"] = attrs.field(
        default="after_backward", validator=_one_of("after_backward", "in_backward")
    )
    viewed_elements: int = attrs.field(default=VIEWED_ELEMENTS, validator=_is_count)
    compile: bool | Literal["model"] = attrs.field(default=False, validator=_one_of(False, True, "model"))
    backend: str = attrs.field(default="inductor", validator=_is_backend)
    unroll: bool = attrs.field(default=False, validator=_truth)

    def __attrs_post_init__(self) -> None:
        _check_couples(self)
        if self.compile is True:
            _check_compiles(self)
        if self.update == "in_backward":
            _check_in_backward(self)
        if self.accumulate == "float32" and (self.unroll or self.compile == "model"):
            raise ValueError(
                'Plan: accumulate="float32" cannot be with unroll=True, which adds the gradients of microbatches '
                'inside the graph as they are, nor with compile="model", since the compiler takes no parameter whose '
                "gradient has another type; use compile=True, or compile=False"
            )
        if self.unroll and self.compile is not True:
            raise ValueError("Plan: unroll=True says how a whole step is compiled; it needs compile=True")

    @property
    def controls(self) -> tuple[Control, ...]:
        """What the plan makes of results; the states of its program have what is kept of each in ``controls``."""
        return (self.schedule.control,) if isinstance(self.schedule, Reactive) else ()

    def describe(self) -> dict[str, str]:
        """Say, part by part, what the run is made of; the part of a plan that goes into checkpoints."""
        model = self.model
        named = class_of(model) if isinstance(model, nn.Module) else model
        parts = {field.name: describe(getattr(self, field.name)) for field in attrs.fields(Plan)}
        return parts | {"model": describe(named)}


def check_plan(what: str, given: object) -> None:
    """Make sure that what a program is made of is a plan.

    Raises:
        ValueError: It is not; ``what`` is the call that it was given to.
    """
    if not isinstance(given, Plan):
        raise ValueError(f"{what} takes a plan, ff.Plan(model=..., loss=..., ...), and got a {type(given).__name__}")
