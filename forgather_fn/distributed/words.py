"""What processes of a run say to each other, of their end above all: a line of JSON each, since JSON runs no code."""

import contextlib
import json
import traceback
from collections.abc import Iterator
from typing import Final

import attrs

from forgather_fn.world import PeerError

LONGEST: Final = 30_000
"""Characters of a traceback that are told; of a longer one, its end."""
LINE_LIMIT: Final = 1 << 20
"""Bytes that a word takes at most: twelve of JSON for each character, and room for the error itself."""
BROKEN: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "ncclRemote")
"""What the texts of collectives that broke have in them; most often they broke because another process had ended."""


@attrs.frozen
class Failed:
    """A process cannot go on.

    Attributes:
        cause: Which rank failed first, its error, and its traceback.
    """

    cause: str


@attrs.frozen
class Left:
    """A process has ended in peace.

    Attributes:
        begun: How many steps it had begun.
    """

    begun: int


@attrs.frozen
class Begun:
    """A process begins what all must begin together.

    Attributes:
        number: How many it has begun, with this.
        what: It is: a noun with its article.
    """

    number: int
    what: str


Word = Failed | Left | Begun


def encoded(word: Word) -> bytes:
    """Write a word as one line."""
    return json.dumps({type(word).__name__: attrs.asdict(word)}).encode() + b"\n"


def decoded(line: bytes) -> Word:
    """Read a word.

    Raises:
        ValueError: It is none.
    """
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(line):
            case {"Failed": {"cause": str(cause)}}:
                return Failed(cause)
            case {"Left": {"begun": int(begun)}} if _is_count(begun):
                return Left(begun)
            case {"Begun": {"number": int(number), "what": str(what)}} if _is_count(number):
                return Begun(number, what)
    raise ValueError(f"expected a word of a process, of what it begins or how it ends, got {line[:100]!r}")


def _is_count(number: int) -> bool:
    return number is not True and number is not False and number >= 0


def cause_of(error: BaseException, rank: int) -> str:
    """Tell of an error of this process: one line that names the rank and the error, then the traceback."""
    told = "".join(traceback.format_exception(error)).rstrip()
    if len(told) > LONGEST:
        told = f"(...)\n{told[-LONGEST:]}"
    summary = "".join(traceback.format_exception_only(error)).strip()
    if len(summary) > LONGEST:
        summary = f"{summary[:LONGEST]} (...)"
    return f"rank {rank} failed: {summary}\n{told}"


def told_by_another(error: BaseException) -> PeerError | None:
    """Find, among the errors that led to this one, word of another process that failed."""
    return next((one for one in _chain(error) if isinstance(one, PeerError)), None)


def is_broken_collective(error: BaseException) -> bool:
    """Tell whether an error, or one that led to it, is that of a collective that another process has left."""
    return any(isinstance(one, RuntimeError) and any(sign in str(one) for sign in BROKEN) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error, and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
