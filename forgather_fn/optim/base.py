"""The contract of optimizers: pairs of pure functions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import attrs
from torch import Tensor

from forgather_fn import flat as flat_storage
from forgather_fn.describe import describe
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import NO_VALUES, Hyper, Number, Scalar, Scheduled, Values
from forgather_fn.schedules import Reactive, Schedule, rate

OptState = Mapping[str, Any]


class OptimizerInit(Protocol):
    """Make the optimizer's state for these parameters."""

    def __call__(self, params: Flat, /) -> OptState:
        """Give slots by name: mappings in the layout of the parameters, tensors, numbers.

        A slot that holds values of the parameters has one of the names in :data:`COPIES`, so that what writes to
        parameters between two steps finds it.
        """
        ...


class OptimizerUpdate(Protocol):
    """Apply one update."""

    def __call__(
        self,
        gradients: Gradients,
        state: OptState,
        params: Flat,
        context: "UpdateContext",
        /,
    ) -> OptState:
        """Update ``params`` and the slots of ``state`` in place (they are donated), and give the new state.

        Where ``context.found_inf`` is 1 instead of 0, nothing must change. ``gradients`` may be used up. Parameters
        that it has no entry for are left untouched, their slots too.
        """
        ...


class Evaluated(Protocol):
    """Give the parameters that a model is to be used with, where those that it is trained with are others."""

    def __call__(self, state: OptState, params: Flat, /) -> Flat:
        """Give them in storage of their own, or of the state's; nothing is changed."""
        ...


@attrs.frozen(repr=False)
class Optimizer:
    """What turns gradients into new parameters.

    Attributes:
        init: ``params -> state``.
        update: ``(gradients, state, params, context) -> state``, in place on what it is given. Those that need shapes
            read ``params[name]``; those that work element by element,
            :func:`~forgather_fn.optim.kernel_calls.kernel_calls`.
        groups: Name each parameter's hyperparameters: ``{name: tensor} -> {name: Hyper}``. If not given, all have the
            schedule's learning rate, and none a weight decay.
        description: How it prints.
        compiles: Whether ``update`` is tensor operations alone, so that it can be part of a graph; its learning rate is
            a scalar tensor there.
        separable: Whether updating parameter by parameter, in any order, is the same as updating all at once.
        elementwise: Whether every element is updated by itself, so that a process may have shards of parameters only.
        schedules: Its hyperparameters that change from step to step, by name; those that groups have are named in their
            :class:`~forgather_fn.hyper.Hyper` as :class:`~forgather_fn.hyper.Scheduled`.
        evaluated: ``(state, params) -> params``: which parameters are evaluated and exported, where those that are
            trained are others; None for the same.
        parts: The optimizers that it is composed of, where each has parameters of its own.
    """

    init: OptimizerInit
    update: OptimizerUpdate
    groups: Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]] = lambda params: dict.fromkeys(params, Hyper())
    description: str = ""
    compiles: bool = True
    separable: bool = False
    elementwise: bool = False
    schedules: Mapping[str, Schedule] = attrs.field(factory=dict)
    evaluated: Evaluated | None = None
    parts: "Mapping[str, Optimizer]" = attrs.field(factory=dict)

    def __repr__(self) -> str:
        return self.description or f"Optimizer({describe(self.update)})"


class UpdateContext(NamedTuple):
    """What a step tells the update of its optimizer. In a compiled step all of it is scalar tensors.

    Attributes:
        learning_rate: The plan's, of this step.
        found_inf: A float32 scalar on the device: 1 where nothing must change, else 0.
        scheduled: The values of the optimizer's own schedules, by name.
        step: Of the run, from 0.
        seed: Of the run, for what an update draws; see :func:`~forgather_fn.optim.rounding.drawn`.
    """

    learning_rate: Scalar
    found_inf: Tensor
    scheduled: Values = NO_VALUES
    step: int | Tensor = 0
    seed: int | Tensor = 0

    def valued(self, number: Number) -> Scalar:
        """Give a hyperparameter's value at this step."""
        return self.scheduled[number.name] if isinstance(number, Scheduled) else number

    def rates_of(self, hyper: Hyper) -> tuple[Scalar, Scalar]:
        """Give learning rate and weight decay of a group at this step, no decay as 0."""
        rate, decay = hyper.learning_rate, hyper.weight_decay or 0.0
        if isinstance(rate, Scheduled) or isinstance(decay, Scheduled):
            return self.learning_rate * self.valued(rate), self.valued(decay)
        return self.learning_rate * rate, decay


class Rates(NamedTuple):
    """What an update is told of its step: the learning rate, and the values of the optimizer's own schedules."""

    learning_rate: Scalar
    scheduled: Values = NO_VALUES

    def metrics(self) -> dict[str, float | Tensor]:
        """Name them for reports; of a group, the rate itself, and not the factor."""
        if not self.scheduled:
            return {"learning_rate": self.learning_rate}
        values = {
            name: value * self.learning_rate if name.startswith("learning_rate/") else value
            for name, value in self.scheduled.items()
        }
        return {"learning_rate": self.learning_rate, **values}


def rates_at(
    schedule: Schedule | Reactive | float, optimizer: Optimizer, step: int, controls: Mapping[str, Any]
) -> Rates:
    """Read all schedules at a step.

    Raises:
        ValueError: A value is not a finite number of at least 0, or a decay rate is not below 1.
    """
    learning_rate = rate(schedule, step, controls)
    if not optimizer.schedules:
        return Rates(learning_rate)
    values = {name: rate(own, step) for name, own in optimizer.schedules.items()}
    for name, value in values.items():
        if name.startswith(BELOW_ONE) and value >= 1:
            raise ValueError(f"schedule of {name}: gave {value} at step {step}: expected a number in [0, 1)")
    return Rates(learning_rate, values)


BELOW_ONE: Final = ("beta1", "beta2")
"""Names of hyperparameters that are decays of running means."""


COPIES: Final = ("master", "slow", "z")
"""Names of slots that hold values of the parameters: the next update would undo what is written to those alone."""


def copies(state: OptState) -> Iterator[Flat]:
    """Give the slots that hold values of the parameters, also those of optimizers inside of others."""
    for name, held in state.items():
        if isinstance(held, Flat):
            if name in COPIES and len(held):
                yield held
        elif isinstance(held, Mapping):
            yield from copies(held)


def rewrite(state: OptState, values: Mapping[str, Tensor]) -> None:
    """Write new values of parameters to the slots that hold such values, in place."""
    for slot in copies(state):
        for name in (name for name in values if name in slot):
            slot[name].copy_(values[name])


def slots_like(params: Flat) -> Flat:
    """Make a slot of zeros in the layout of the parameters, for optimizers of your own."""
    return flat_storage.zeros(params.layout, params.buffers[0].device)


def check_optimizer(name: str, given: object) -> None:
    """Make sure that what an optimizer is composed of is one of this library's.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(given, Optimizer):
        raise ValueError(
            f"{name}: {describe(given)} is not one of this library's optimizers: use ff.adamw(), ff.optim.lion(), or "
            "adapt one of torch with ff.from_torch"
        )


def check_betas(name: str, betas: Sequence[float | Schedule], eps: float) -> None:
    """Make sure that an optimizer's decay rates are in [0, 1); those that schedules give are checked as they are read.

    Raises:
        ValueError: They are not two such numbers, or ``eps`` is negative.
    """
    if len(betas) != 2 or not all(callable(beta) or 0 <= beta < 1 for beta in betas) or not 0 <= eps < math.inf:
        raise ValueError(
            f"{name}: betas must be two numbers in [0, 1) and eps at least 0, and finite; got betas={betas}, eps={eps}"
        )
