"""Bounds on what a configuration may take: an input from anywhere ends, soon, in a result or an error."""

import time
from collections.abc import Callable, Sized
from typing import Any, Final

import attrs

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
SECONDS: Final = 20.0
"""How long a rendering may take."""


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
        size = len(value) if isinstance(value, Sized) and isinstance(value, str | list | dict | tuple | range) else 0
        if size > SOURCE:
            raise ConfigError(f"a template made a value of size {size:,}; at most {SOURCE:,} are allowed")
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
