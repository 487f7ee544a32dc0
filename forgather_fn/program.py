"""A program: the functions that a strategy makes of a plan."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from torch import Tensor, nn

from forgather_fn.data import Stream
from forgather_fn.gradient import Gradients
from forgather_fn.metrics import Measure as Measure
from forgather_fn.plan import Plan
from forgather_fn.portion import Portion
from forgather_fn.share import Share
from forgather_fn.state import Params, TrainState, as_state
from forgather_fn.world import ALONE, World

if TYPE_CHECKING:
    from forgather_fn.conversion import Conversion
    from forgather_fn.loop import Steps

Metrics = Mapping[str, Any]


class Init(Protocol):
    """Make the first state of a run."""

    def __call__(self, seed: int = 0) -> TrainState:
        """Take the values that the plan's module has now, or build one from its factory under ``seed``.

        The state has storage of its own, and the program's module is bound to it.
        """
        ...


class Restore(Protocol):
    """Make the state that a checkpoint holds."""

    def __call__(self, path: str | Path, *, allow: Collection[str] = (), without: Collection[str] = ()) -> TrainState:
        """Read a checkpoint, or the latest whole one of a run; ``steps`` goes on at the sample that it names.

        Args:
            path: A checkpoint directory, which must be whole, or a run directory.
            allow: What may differ from the plan that it was made by, on purpose: ``"schedule"``, ``"optimizer"``,
                ``"loss"``, ... and, of the stream that goes on, ``"batch_size"`` and ``"data"``.
            without: What is not read and starts fresh: ``"optimizer"``, ``"ema"``, ``"transforms"``,
                ``"controls"``, ``"loss_scale"``, ``"progress"`` (steps, samples, counters).

        Raises:
            CheckpointError: It is damaged, or something differs; both sides are shown.
        """
        ...


class Step(Protocol):
    """Consume a state and a batch; give the next state."""

    def __call__(
        self, state: TrainState, batch: Any, /, *, wants: frozenset[str] = frozenset()
    ) -> tuple[TrainState, Metrics]:
        """Run forward, backward and the update on one batch.

        Args:
            state: Consumed when the update begins; a failure before that leaves it readable.
            batch: A :class:`~forgather_fn.data.Batch`, or plain data whose leading dimension counts the samples.
            wants: Metrics beyond the usual ones, of each parameter: ``"gradient_norms"``, ``"parameter_norms"``,
                ``"update_norms"``, ``"gradients"``; see :data:`~forgather_fn.wanted.WANTS`.

        Returns:
            The next state, and metrics: each :class:`~forgather_fn.mean.Mean` that the loss named, what transforms
            report, and ``learning_rate``. Tensors stay on the device.
        """
        ...


class TakeGradients(Protocol):
    """Compute the gradient of one batch, and change nothing."""

    def __call__(self, state: TrainState, batch: Any, /) -> tuple[Gradients, Mapping[str, Any], Metrics]:
        """Give the mean gradient, the buffers as the forward passes leave them, and the metrics of the loss."""
        ...


class Update(Protocol):
    """Apply a gradient to a state."""

    def __call__(
        self,
        state: TrainState,
        gradients: Gradients | Mapping[str, Tensor],
        /,
        buffers: Mapping[str, Any] | None = None,
        *,
        batch: Any = None,
    ) -> tuple[TrainState, Metrics]:
        """Run transforms and optimizer; the state is consumed, the gradient is not.

        Args:
            state: What is updated.
            gradients: Those that :class:`TakeGradients` gave; or your own, by the names of the parameters, as a mean
                over a batch. A parameter without one is left untouched.
            buffers: Those that :class:`TakeGradients` gave; None keeps the state's own.
            batch: What gradients of your own are of, as ``step`` takes it: it moves the position in the data.

        Raises:
            ValueError: Names or shapes are not the model's, or ``batch`` is missing, or given for the step's own.
        """
        ...


class Evaluate(Protocol):
    """Measure a state on data."""

    def __call__(
        self,
        state: TrainState,
        data: Any,
        /,
        *,
        params: Params = "params",
        metrics: Sequence[Measure] = (),
    ) -> dict[str, float]:
        """Run the loss over every sample once, without gradients, in evaluation mode, and give each named mean.

        ``metrics`` are measured of the same outputs: functions ``(outputs, batch) -> {name: Mean}`` and aggregates,
        such as those of :mod:`~forgather_fn.metrics`.

        Means are added over batches and divided once, so the result does not depend on the batch size. ``"params"`` are
        the parameters that are trained, or those that the optimizer has evaluated instead
        (:attr:`Optimizer.evaluated <forgather_fn.optim.base.Optimizer>`); here as in ``apply`` and ``export``.
        """
        ...


class Apply(Protocol):
    """Call the model on inputs."""

    def __call__(self, state: TrainState, /, *inputs: Any, params: Params = "params", **named: Any) -> Any:
        """Give the model's outputs in evaluation mode, without gradients."""
        ...


class Export(Protocol):
    """Take the model out of the training."""

    def __call__(self, state: TrainState, /, *, params: Params = "params") -> nn.Module:
        """Give a copy of the module with the state's values, bound to no state.

        ``requires_grad`` is as the plan has it.
        """
        ...


class Carry(Protocol):
    """Carry a state from one program into another; see :meth:`Program.convert`."""

    def __call__(
        self,
        old: "Program",
        state: TrainState,
        new: "Program",
        /,
        *,
        dropping: Collection[str],
        without: Collection[str],
        tell: "Callable[[Conversion], object] | None",
    ) -> TrainState:
        """Make the state of the new program; the old one's is not consumed."""
        ...


class Whole(Protocol):
    """Bring a state together that lies in shards, to be written; collective."""

    def __call__(self, state: TrainState, /) -> TrainState | None:
        """Give the state itself where every process has all of it.

        Otherwise give a copy of it, whole, in the memory of the first process's host, and None on the others.
        """
        ...


class Check(Protocol):
    """Refuse what is no state of a program."""

    def __call__(self, state: TrainState, /) -> TrainState:
        """Give the state back.

        Raises:
            ValueError: It is of another model or plan.
        """
        ...


def public(**functions: Any) -> None:
    """Name the functions of a program as its users know them, and give them the text of their contracts.

    Python's own error of a wrong call begins with the name, and ``help(program.step)`` prints the text.

    Example:
        >>> def take(state, batch, /): ...
        >>> public(step=take)
        >>> take()
        Traceback (most recent call last):
        TypeError: Program.step() missing 2 required positional arguments: 'state' and 'batch'
    """
    for name, function in functions.items():
        contract = _CONTRACTS[name]
        function.__name__, function.__qualname__ = name, f"Program.{name}"
        function.__doc__ = f"{inspect.getdoc(contract)}\n\n{inspect.getdoc(contract.__call__)}"


_CONTRACTS: Mapping[str, Any] = {
    "init": Init,
    "restore": Restore,
    "step": Step,
    "gradients": TakeGradients,
    "update": Update,
    "evaluate": Evaluate,
    "apply": Apply,
    "export": Export,
}


def itself(state: TrainState, /) -> TrainState | None:
    """Give a state that every process has whole."""
    return state


class OpenBatches(Protocol):
    """Start reading."""

    def __call__(self, state: TrainState, data: Iterable[Any] | Stream, /) -> Iterator[Any]:
        """Give the batches of a stream from where the state left it, or of any iterable from where it starts."""
        ...


class OpenSteps(Protocol):
    """Start a run."""

    def __call__(self, program: "Program", state: TrainState, data: Iterable[Any] | Stream, /) -> "Steps":
        """Give the ticks of a program's ``step`` over data; see :meth:`Program.steps`."""
        ...


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Program:
    """What a strategy makes of a plan: a frozen record of functions. Loops know nothing else.

    ``step`` is ``gradients`` and ``update`` composed; a step of your own takes its place by
    ``attrs.evolve(program, step=...)``. ``module`` gives the module that is bound to the states.
    ``world`` is the processes that run it together; ``share`` which microbatches of a step this one has, None for all;
    ``batches`` how they come to it; ``portion`` which of a state this process has, None for all of it; ``whole``
    brings a state together that they have in shards; ``check`` refuses a state of another program. ``members`` are the
    programs of a joint one, by name; none where it is of one model.
    """

    plan: Plan
    init: Init
    restore: Restore
    module: Callable[[], nn.Module]
    step: Step
    gradients: TakeGradients
    update: Update
    evaluate: Evaluate
    apply: Apply
    export: Export
    carry: Carry
    batches: OpenBatches
    open_steps: OpenSteps
    world: World = ALONE
    share: Share | None = None
    portion: Callable[[], Portion | None] = lambda: None
    whole: Whole = itself
    check: Check = as_state
    members: "Mapping[str, Program]" = attrs.field(factory=dict)

    def steps(self, state: TrainState, data: Iterable[Any] | Stream, /) -> "Steps":
        """Give the ticks over a data stream, from where the state left it, or over any iterable of batches."""
        return self.open_steps(self, state, data)

    def convert(
        self,
        state: TrainState,
        program: "Program",
        /,
        *,
        dropping: Collection[str] = (),
        without: Collection[str] = (),
        tell: "Callable[[Conversion], object] | None" = None,
    ) -> TrainState:
        """Make the state of another program that goes on where one of this program is, which is not consumed.

        Parameters and buffers are carried by name, whatever their groups and data types are, and whether they are
        trained or not; so are the optimizer's slots, the average, and what else has the same name and shape on both
        sides: in this library a slot's name says what it is. What the other program has besides is as its ``init``
        makes it, an average as the parameters. Slots that an optimizer of torch makes at its first update are carried
        to an equal one only; the state of a transform to one of the same kind at the same place. The step, samples,
        seed, and counters go on.

        Args:
            state: Of this program.
            program: The other; it is initialised under the state's seed, and its module is bound to the result.
            dropping: Patterns of the names of parameters that are left behind. Any other that the other program lacks,
                or has in another shape, is an error.
            without: What starts fresh, as in :class:`Restore`.
            tell: Called with an account of what was carried, is fresh, or was dropped: ``tell=print``.

        Raises:
            ValueError: A parameter has no place, a pattern matches none, or processes have parts of the states only.
        """
        return self.carry(self, state, program, dropping=dropping, without=without, tell=tell)

    def __repr__(self) -> str:
        parts = "\n".join(f"  {name}={text}" for name, text in self.plan.describe().items())
        return f"Program(\n{parts}\n)"
