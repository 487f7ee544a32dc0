"""What reducers are, and where what they keep lies."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import attrs

from forgather_fn.describe import describe

Kept = Mapping[str, Any]
"""Plain numbers, and tuples of them: on the host, so that reading them never waits for a device."""


class Begin(Protocol):
    """Make what a reducer keeps before the first number."""

    def __call__(self) -> Kept:
        """Give plain numbers, and tuples of them, by name."""
        ...


class Add(Protocol):
    """Take one more number."""

    def __call__(self, kept: Kept, number: float, /) -> Kept:
        """Give what is kept now; what was is not changed."""
        ...


class Result(Protocol):
    """Say what the numbers so far come to."""

    def __call__(self, kept: Kept, /) -> float:
        """Give one number."""
        ...


@attrs.frozen(repr=False)
class Reducer:
    """A fold over numbers that come one at a time, as three pure functions.

    Attributes:
        init: ``() -> kept``.
        add: ``(kept, number) -> kept``.
        result: ``kept -> number``.
        description: How it prints.
    """

    init: Begin
    add: Add
    result: Result
    description: str = ""

    def __repr__(self) -> str:
        return self.description or f"Reducer({describe(self.add)})"


@attrs.frozen
class Control:
    """A reducer over one of the results that observers find; what it keeps is ``state.controls[name]``.

    Attributes:
        name: Under which it is kept.
        metric: The result, such as ``"eval_loss"``.
        reducer: What is made of it.
    """

    name: str
    metric: str
    reducer: Reducer

    def kept(self, controls: Mapping[str, Any]) -> Kept:
        """Give what is kept so far; see :func:`kept_of`."""
        return kept_of(self.reducer, controls, self.name)


def kept_of(reducer: Reducer, controls: Mapping[str, Any], name: str) -> Kept:
    """Give what a reducer has kept under a name so far: what it begins with, where nothing is.

    Raises:
        ValueError: Something else is kept there.
    """
    first = reducer.init()
    if name not in controls:
        return first
    found = controls[name]
    if not isinstance(found, Mapping) or not first.keys() <= found.keys():
        raise ValueError(
            f"controls[{name!r}] of the state is {found!r}, which {reducer!r} has not kept: it keeps {list(first)}. "
            "Let it begin anew: restore with without={'controls'}; or keep it under another name"
        )
    kept: Kept = found
    return kept


def begun(controls: Iterable[Control]) -> dict[str, Kept]:
    """Give what is kept of each before the first result, by name."""
    return {control.name: control.reducer.init() for control in controls}
