"""Bounds on what a configuration may take: an input from anywhere ends, soon, in a result or an error."""

import time
from collections.abc import Callable
from typing import Any, Final

import attrs
from jinja2.utils import Namespace

from forgather_fn.config.errors import ConfigError

SOURCE: Final = 1_000_000
"""Characters of one template, of all text that is rendered, and of text that is parsed."""
DEPTH: Final = 100
"""How deep nodes lie in each other, also through aliases."""
NODES: Final = 20_000
"""Nodes of a graph, each counted as often as it is referred to."""
TEMPLATES: Final = 1_000
"""Templates that one rendering loads."""
WORK: Final = 500_000
"""Outputs, calls, loop items, and hundreds of characters handled, in one rendering."""
NUMBER: Final = 100_000
"""The largest width, count or exponent that a template may ask for."""
SEARCH: Final = 100_000_000
"""How long two texts of which one is searched for the other may be, multiplied; and the like for lists."""
SECONDS: Final = 20.0
"""How long a rendering may take."""


def extent(value: Any) -> int:
    """Count about what writing or comparing a value would go through: its parts, as often as they are referred to.

    Counting ends soon after :data:`SOURCE`: a value that refers twice to one that refers twice to another, and so on,
    is small, and what it is written as is not.

    Example:
        >>> extent("abc"), extent([["abc", 1], ["abc", 1]]), extent({"a": "abc"}), extent(7)
        (3, 39, 14, 0)
    """
    total, waiting = 0, [value]
    while waiting and total <= SOURCE:
        one = waiting.pop()
        if isinstance(one, str | range):
            total += len(one)
            continue
        if isinstance(one, Namespace):
            one = one._Namespace__attrs
        if isinstance(one, list | tuple | dict | set | frozenset):
            total += 9 + len(one)
            parts = [*one, *one.values()] if isinstance(one, dict) else one
            waiting += [part for part in parts if type(part) not in _ATOMS] if total <= SOURCE else []
    return total


_ATOMS: Final = frozenset({int, float, bool, type(None)})


@attrs.define(eq=False)
class Budget:
    """What is left to one rendering."""

    left: int = WORK
    room: int = 4 * SOURCE
    clock: Callable[[], float] = time.monotonic
    deadline: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.deadline = self.clock() + SECONDS

    def charge(self, value: Any) -> Any:
        """Pay for a value that was made or walked through, by its size, and give it back.

        Raises:
            ConfigError: Nothing is left, or the value alone is too large.
        """
        size = extent(value)
        if size > SOURCE:
            raise ConfigError(f"a template made a value of more than {SOURCE:,} parts and characters")
        if isinstance(value, int) and value.bit_length() > NUMBER:
            raise ConfigError("a template computes a number that is too large")
        self.pay(1 + size // 100)
        return value

    def write(self, text: str) -> str:
        """Pay for output, which may be captured and written again, and give it back."""
        self.room -= len(text)
        if self.room < 0:
            raise ConfigError(f"templates write more than {SOURCE:,} characters")
        self.pay(1)
        return text

    def pay(self, work: int) -> None:
        """Pay for work."""
        self.left -= work
        if self.left < 0:
            raise ConfigError(
                f"rendering takes more than {WORK:,} outputs, calls and loop items: is there a loop without an end?"
            )
        if self.clock() > self.deadline:
            raise ConfigError(f"rendering takes more than {SECONDS:g} seconds: is there a loop without an end?")
