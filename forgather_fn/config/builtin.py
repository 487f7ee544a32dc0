"""What a configuration may call by a bare name: builtins, and a few functions on what is built."""

import operator
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from forgather_fn.config.bounds import SOURCE

WIDEST: Final = 10_000
"""Characters that a field of a format string may be padded to."""


class _Fields(string.Formatter):
    """Format strings that look at no private names. One object serves one call."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if any(part.startswith("_") for part in field_name.replace("[", ".").replace("]", ".").split(".")):
            raise ValueError(f"format: the field {field_name!r} has a private name; expected public ones")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        digits = "".join(one if one.isdigit() else " " for one in format_spec).split()
        if any(len(one) > 6 or int(one) > WIDEST for one in digits):
            raise ValueError(f"format: {format_spec!r} asks for more than {WIDEST} characters")
        text: str = super().format_field(value, format_spec)
        self.length += len(text)
        _check_length("format", self.length)
        return text


def format_text(text: str, *args: Any, **kwargs: Any) -> str:
    """Format as ``str.format`` does, but refuse private names and huge widths.

    Raises:
        ValueError: A field has a private name, or is too wide.

    Example:
        >>> format_text("{0:03d}-{name}", 7, name="x")
        '007-x'
        >>> format_text("{0.__class__}", 7)
        Traceback (most recent call last):
        ValueError: format: the field '0.__class__' has a private name; expected public ones
    """
    return _Fields().vformat(text, args, kwargs)


def join_text(separator: str, parts: Iterable[str]) -> str:
    """Join as ``str.join`` does.

    Raises:
        ValueError: The result would be too long.
    """
    given = list(parts)
    _check_length("join", sum(map(len, given)) + len(separator) * len(given))
    return separator.join(given)


def _check_length(name: str, length: int) -> None:
    if length > SOURCE:
        raise ValueError(f"{name}: the result has more than {SOURCE:,} characters")


def items(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """List the keys and values of a mapping."""
    return list(mapping.items())


def keys(mapping: Mapping[Any, Any]) -> list[Any]:
    """List the keys of a mapping."""
    return list(mapping.keys())


def values(mapping: Mapping[Any, Any]) -> list[Any]:
    """List the values of a mapping."""
    return list(mapping.values())


def named_list(*given: Any) -> list[Any]:
    """Make a list of the arguments."""
    return list(given)


def named_tuple(*given: Any) -> tuple[Any, ...]:
    """Make a tuple of the arguments."""
    return given


def named_dict(**given: Any) -> dict[str, Any]:
    """Make a dict of the arguments."""
    return given


_OWN: Final = (items, keys, values, named_list, named_tuple, named_dict)
_PYTHON: Final = (
    *(dict, list, tuple, set, frozenset, int, float, bool, str, complex, slice),
    *(abs, len, max, min, round, sorted),
)
BUILTINS: Final[Mapping[str, Callable[..., Any]]] = {
    **{kind.__name__: kind for kind in _PYTHON},
    **{function.__name__: function for function in _OWN},
    **{f"str.{name}": getattr(str, name) for name in ("lower", "split", "strip", "upper")},
    "str.format": format_text,
    "str.join": join_text,
    "format": format_text,
    "getitem": operator.getitem,
    "call": operator.call,
}
"""Each by the name that it has in a configuration."""
