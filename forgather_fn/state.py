"""The state of a training run: frozen, data only, owned by one holder at a time."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Literal

import attrs
import torch
from torch import Tensor

from forgather_fn import tree
from forgather_fn.flat import Flat
from forgather_fn.terminal import ordinal

_CONSUMED: Final = """this TrainState was consumed by {where}: its tensors were updated in place and belong to the \
state that was returned.
  What to do instead:
    state, metrics = program.step(state, batch)    # go on with the state that a step returns
    kept = state.copy()                            # before the step, to keep this one
    Plan(..., donate=False)                        # to have every step copy first (slower; for tests)"""


class ConsumedStateError(ValueError):
    """A state was read, or stepped, after a step had taken its tensors over."""


class NonFiniteError(ValueError):
    """A loss or gradient was infinite or nan; nothing was updated by it."""

    known_to_all = True
    """Gradients are added up over processes before they are looked at, so all of them raise it."""


COUNTERS: Final = ("updates", "skipped", "tokens", "nonfinite")
"""What a state counts on the device; ``nonfinite`` is the first step that was not finite, or -1."""

RESTARTABLE: Final = frozenset({"optimizer", "ema", "transforms", "controls", "loss_scale", "progress"})
"""What of a state may begin anew where it is carried on: what ``restore`` and ``convert`` take as ``without``."""

Params = Literal["params", "ema"]
"""Which parameters of a state: those that are trained, or the average that the plan keeps of them, whichever it is."""


@attrs.define(eq=False)
class Ownership:
    """Who may still read some tensors: shared by all states that alias them, taken by the step that changes them."""

    consumed_by: str | None = None
    _readers: list[Callable[[], object]] = attrs.field(factory=list)

    def lend(self, wait: Callable[[], object]) -> None:
        """Let somebody read the tensors in the background; whoever takes them calls ``wait`` first."""
        self._readers.append(wait)

    def settle(self) -> None:
        """Wait for all who read in the background."""
        for wait in self._readers:
            wait()
        self._readers.clear()

    def take(self, where: str) -> None:
        """Consume: every state that shares this token refuses to be read from now on."""
        self.settle()
        self.consumed_by = where


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Arrays:
    """What of a state lives on the device. :class:`TrainState` says what each is."""

    updates: Tensor
    skipped: Tensor
    tokens: Tensor
    nonfinite: Tensor
    params: Flat
    frozen: Mapping[str, Tensor]
    buffers: Flat
    opt: Mapping[str, Any]
    transforms: tuple[Any, ...] = ()
    ema: Flat | None = None
    controls: Mapping[str, Any] = attrs.field(factory=dict)
    loss_scale: Mapping[str, Tensor] = attrs.field(factory=dict)

    def changing(self) -> dict[str, Any]:
        """Give, as a tree, what a step changes: everything but the frozen parameters."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(Arrays) if field.name != "frozen"}


@attrs.frozen(kw_only=True, eq=False, repr=False)
class TrainState:
    """Everything that a run is, at one instant between two steps.

    Data only: tensors by qualified name and a few integers, no code, no generators, no timers. A step *consumes* the
    state that it is given (its tensors are updated in place) and returns the next; reading a consumed state raises
    :class:`ConsumedStateError`. Tensors taken out of a state alias it: copy what should stay as it is.

    Attributes:
        step: Batches consumed so far, also those whose update was skipped. Schedules and random keys read it.
        samples: Samples consumed by the whole job: the position in the data.
        seed: The root of all randomness of the run.
        data: The fingerprint of the stream that it is trained on; None before the first.
        batch_size: That of the stream, in samples; the text of its schedule, where batches are of several sizes.
        cursor: Where the data goes on, for sources that a number of samples does not say it of (JSON; opaque, it is the
            source's own); else None.
    """

    step: int
    samples: int
    seed: int
    data: str | None = None
    batch_size: int | str | None = None
    cursor: str | None = None
    _arrays: Arrays
    _ownership: Ownership = attrs.field(factory=Ownership)

    def read(self) -> Arrays:
        """Give what lives on the device.

        Raises:
            ConsumedStateError: A step has consumed this state.
        """
        if self._ownership.consumed_by is not None:
            raise ConsumedStateError(_CONSUMED.format(where=self._ownership.consumed_by))
        return self._arrays

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Trainable parameters by qualified name; a tied one under its first name."""
        return self.read().params

    @property
    def frozen(self) -> Mapping[str, Tensor]:
        """Parameters that are not trained. Shared between states, not copied."""
        return self.read().frozen

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The module's buffers, as the last training step left them."""
        return self.read().buffers

    @property
    def opt(self) -> Mapping[str, Any]:
        """The optimizer's state, slots by name, then by parameter."""
        return self.read().opt

    @property
    def transforms(self) -> tuple[Any, ...]:
        """The state of each gradient transform, in order."""
        return self.read().transforms

    @property
    def ema(self) -> Mapping[str, Tensor] | None:
        """Averaged parameters, where the plan asks for them."""
        return self.read().ema

    @property
    def controls(self) -> Mapping[str, Any]:
        """What reducers keep (:mod:`forgather_fn.reducers`): plain numbers, which a step carries along unchanged."""
        return self.read().controls

    @property
    def loss_scale(self) -> Mapping[str, Tensor]:
        """What float16 scales the loss by, as ``scale`` and ``growth_tracker``; empty in any other precision."""
        return self.read().loss_scale

    @property
    def updates(self) -> Tensor:
        """Updates applied: an int64 scalar."""
        return self.read().updates

    @property
    def skipped(self) -> Tensor:
        """Steps whose update was left out, because it was not finite: an int64 scalar."""
        return self.read().skipped

    @property
    def tokens(self) -> Tensor:
        """The sum of the objective's weights (tokens of a language model, else samples), rounded down a step: int64."""
        return self.read().tokens

    @property
    def nonfinite(self) -> Tensor:
        """The first step that was not finite, or -1: an int64 scalar."""
        return self.read().nonfinite

    @property
    def consumed(self) -> bool:
        """Whether a step has taken this state's tensors over."""
        return self._ownership.consumed_by is not None

    def consume(self, where: str) -> Arrays:
        """Take the tensors over. This state, and every other that shares them, refuses to be read from now on.

        Args:
            where: Who takes them, for the error message.
        """
        arrays = self.read()
        self._ownership.take(where)
        return arrays

    def controlled(self, controls: Mapping[str, Any]) -> "TrainState":
        """Give a state with other controls that shares everything else with this one."""
        return attrs.evolve(self, arrays=attrs.evolve(self.read(), controls=controls))

    def shares(self, other: "TrainState") -> bool:
        """Tell whether the step that consumes one of these states consumes the other too."""
        return self._ownership is other._ownership

    def lend(self, wait: Callable[[], object]) -> None:
        """Let somebody read this state in the background: the step that consumes it calls ``wait`` first."""
        self.read()
        self._ownership.lend(wait)

    def settle(self) -> None:
        """Wait until nobody reads this state in the background any more."""
        self.read()
        self._ownership.settle()

    def copy(self) -> "TrainState":
        """Copy everything that a step would change. Frozen parameters are shared."""
        arrays = self.read()
        copied = Arrays(frozen=arrays.frozen, **tree.copied(arrays.changing()))
        return attrs.evolve(self, arrays=copied, ownership=Ownership())

    def as_tree(self) -> dict[str, Any]:
        """Give the whole state as nested mappings, for walking, comparing, and saving."""
        arrays = self.read()
        host: dict[str, Any] = {"step": self.step, "samples": self.samples, "seed": self.seed}
        host |= {"data": self.data, "batch_size": self.batch_size, "cursor": self.cursor}
        return host | {field.name: getattr(arrays, field.name) for field in attrs.fields(Arrays)}

    def __repr__(self) -> str:
        head = f"TrainState(step={self.step}, samples={self.samples}, seed={self.seed}"
        if self.consumed:
            return f"{head}, consumed by {self._ownership.consumed_by})"
        parts = [head]
        for name in ("params", "frozen", "buffers", "opt", "ema"):
            tensors, elements, size = tree.size(getattr(self._arrays, name))
            if tensors:
                parts.append(f"{name}={elements:,} in {tensors} tensors ({_readable(size)})")
        return ", ".join(parts) + ")"


def difference(one: TrainState, other: TrainState) -> str | None:
    """Name the first path at which two states differ, to the bit; None if they are equal."""
    return tree.difference(as_state(one).as_tree(), as_state(other).as_tree())


def as_state(given: Any) -> TrainState:
    """Give back what is a state, and say what was given instead of one.

    Raises:
        ValueError: It is something else, such as the pair that a step returns.
    """
    if isinstance(given, TrainState):
        return given
    if isinstance(given, tuple) and given and isinstance(given[0], TrainState):
        fix = "that is what a step returns; take it apart: state, metrics = program.step(state, batch)"
    else:
        fix = "make one by program.init(seed), or by program.restore(run)"
    kind = type(given).__name__
    raise ValueError(f"expected a TrainState, got {'an' if kind[0] in 'AEIOU' else 'a'} {kind}: {fix}")


def raise_if_nonfinite(state: TrainState) -> None:
    """Look at the flag that non-finite steps set on the device, and raise if it is set. This waits for the device.

    Raises:
        NonFiniteError: A step was not finite; the first one is named. Parameters are as they were before it.
    """
    first = int(state.nonfinite)
    if first >= 0:
        raise NonFiniteError(nonfinite_message(first))


def nonfinite_message(step: int, what: str = "the loss or a gradient") -> str:
    """Say what a non-finite step means and what can be done."""
    return (
        f"step {step} (the {ordinal(step + 1)}): {what} was not finite (inf or nan). No update was made by it or after "
        "it: parameters, optimizer and buffers are as they were before. Lower the learning rate, clip, look at this "
        "batch (several processes on accelerators: whether all were given it), or pass "
        'Plan(on_nonfinite="skip") to leave such steps out and go on.'
    )


def counter(value: int, device: torch.device) -> Tensor:
    """Make an int64 scalar on the device."""
    return torch.full((), value, dtype=torch.int64, device=device)


def _readable(size: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if size < 1024 ** (i + 1)), len(units) - 1)
    return f"{size / 1024**power:.{min(power, 1)}f} {units[power]}"


def check_names(argument: str, given: Collection[str], known: Collection[str]) -> None:
    """Make sure that an argument is a set of known names.

    Args:
        argument: Whose, and how it is called: ``"restore: without"``.
        given: What it is.
        known: What it may have in it.

    Raises:
        ValueError: It is one text, or has something else in it.
    """
    names = isinstance(given, Collection) and not isinstance(given, str | bytes)
    if not names or not all(isinstance(name, str) and name in known for name in given):
        raise ValueError(f"{argument}={given!r}: expected a set of names out of {sorted(known)}")
