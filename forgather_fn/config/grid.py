"""Grids: every combination of some values."""

import itertools
from collections.abc import Sequence

from forgather_fn.config.errors import ConfigError


def points(items: Sequence[str]) -> list[dict[str, str]]:
    """List the points of a grid; the last name changes fastest.

    Args:
        items: ``NAME=A,B,C``; commas in brackets, braces and quotes belong to a value.

    Raises:
        ConfigError: An item is not of this form, or a name is there twice.

    Example:
        >>> points(["lr=1e-3,3e-4", "betas=[0.9,0.99]"])
        [{'lr': '1e-3', 'betas': '[0.9,0.99]'}, {'lr': '3e-4', 'betas': '[0.9,0.99]'}]
    """
    axes: dict[str, list[str]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        values = _split(text)
        if not name or not equals or not all(values):
            raise ConfigError(f"--grid {item}: expected NAME=A,B,C")
        if name in axes:
            raise ConfigError(f"--grid {item}: {name} is there twice")
        axes[name] = values
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for one in text:
        if quote:
            quote = "" if one == quote else quote
        elif one in "'\"":
            quote = one
        elif one in "[{(":
            depth += 1
        elif one in "]})":
            depth -= 1
        if one == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += one
    return parts
