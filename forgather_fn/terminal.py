"""Text for a terminal: what comes from a file or from another process may hold anything."""

import datetime as dt
import sys


def printable(text: str) -> str:
    r"""Show what a terminal would act on as an escape, and what it cannot show as a question mark.

    Names of metrics, paths and errors may hold anything.

    Example:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return shown.encode(encoding, "replace").decode(encoding)


def lines_of(text: str) -> str:
    """Show several lines, each as :func:`printable` does."""
    return "\n".join(map(printable, text.split("\n")))


def ordinal(number: int) -> str:
    """Show which of several something is, counted from 1.

    Example:
        >>> ordinal(1), ordinal(12), ordinal(23), ordinal(61), ordinal(111)
        ('1st', '12th', '23rd', '61st', '111th')
    """
    teen = 10 <= number % 100 < 20
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def instant(seconds: float) -> str:
    """Show an instant, in seconds since 1970, by the clock of the place; a question mark where it is none.

    Example:
        >>> instant(float("nan"))
        '?'
    """
    try:
        return f"{dt.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "?"


def span(seconds: float) -> str:
    """Show how long something takes; a question mark where that is no time.

    Example:
        >>> span(3723.4), span(float("inf"))
        ('1:02:03', '?')
    """
    try:
        return str(dt.timedelta(seconds=round(seconds)))
    except (ValueError, OverflowError):
        return "?"
