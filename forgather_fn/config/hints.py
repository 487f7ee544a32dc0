"""What may have been meant by a name that is not known."""

import itertools
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

_LONGEST: Final = 80
_MOST: Final = 2_000
"""Comparing takes the product of two lengths, and names may come from anywhere."""


def nearest(name: str, known: Iterable[object]) -> str | None:
    """Find the known name that is most like a name, if any is.

    Example:
        >>> nearest("max_stps", ["max_steps", "seed"]), nearest("x", ["max_steps"])
        ('max_steps', None)
    """
    if len(name) > _LONGEST:
        return None
    names = [text for one in itertools.islice(known, _MOST) if len(text := str(one)) <= _LONGEST]
    return next(iter(get_close_matches(name, names, n=1)), None)
