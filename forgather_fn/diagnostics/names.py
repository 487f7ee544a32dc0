"""Names that are chosen by patterns."""

import difflib
import fnmatch
from collections.abc import Iterable


def chosen(what: str, names: Iterable[str], pattern: str) -> list[str]:
    """Give the names that match a pattern of the shell, such as ``"layers.*.mlp"``; the star matches dots as well.

    Raises:
        ValueError: None does; those that are nearest to it are listed.

    Example:
        >>> chosen("parameter", ["0.weight", "0.bias", "2.weight"], "*.weight")
        ['0.weight', '2.weight']
    """
    known = list(names)
    found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.0)
        raise ValueError(f"no {what} has a name like {pattern!r}; there are, the nearest first: {', '.join(near)}")
    return found
