"""Rendered text that knows, line by line, where it came from."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from forgather_fn.config.errors import UNKNOWN, Position


class Text(str):
    """A string whose lines have origins: what templates are rendered to.

    Operations of ``str`` give plain strings; :func:`joined` and :func:`stripped` keep origins.

    Attributes:
        origins: For each line, where it came from.
        templates: The source of each template that was used, by its name.
        secrets: Values that were looked up under secret names, which no record may hold.
        variables: Names that the templates refer to.
        references: Which template extends, includes or imports which, in the order in which they are first asked for.
    """

    origins: tuple[Position, ...]
    templates: Mapping[str, str]
    secrets: frozenset[str]
    variables: frozenset[str]
    references: tuple[tuple[str, str], ...]

    def __new__(
        cls,
        text: str,
        origins: Iterable[Position] = (),
        templates: Mapping[str, str] = MappingProxyType({}),
        secrets: Iterable[str] = (),
        variables: Iterable[str] = (),
        references: Iterable[tuple[str, str]] = (),
    ) -> "Text":
        """Make a string with origins, one for each line, or none."""
        made = super().__new__(cls, text)
        made.origins = tuple(origins)
        made.templates = templates
        made.secrets = frozenset(secrets)
        made.variables = frozenset(variables)
        made.references = tuple(references)
        return made

    def __str__(self) -> str:
        return self  # Jinja converts all output by str(); the origins must come through

    def __reduce__(self) -> tuple[Any, ...]:
        return Text, (
            str.__str__(self),
            self.origins,
            dict(self.templates),
            self.secrets,
            self.variables,
            self.references,
        )

    def origin(self, line: int) -> Position:
        """Tell where a line, counted from 0, came from."""
        return self.origins[line] if line < len(self.origins) else UNKNOWN


def origin(text: str, line: int) -> Position:
    """Tell where a line, counted from 0, of any text came from; of a plain string, that line itself."""
    if isinstance(text, Text) and text.origins:
        return text.origin(line)
    lines = text.split("\n", line + 1)
    return Position("<text>", line + 1, text=lines[line] if line < len(lines) else "")


def at(text: str, place: Position) -> Text:
    """Say that all lines of a text come from one place."""
    return Text(text, [place] * (text.count("\n") + 1))


def literal(text: str, start: Position, source: Sequence[str]) -> Text:
    """Say that a text stands in a template, from a line of it on.

    Args:
        text: As it stands there.
        start: The place of its first line.
        source: The lines of the file.
    """
    lines = range(start.line, start.line + text.count("\n") + 1)
    known = [source[line - 1] if line <= len(source) else "" for line in lines]
    return Text(text, [Position(start.template, n, start.block, line) for n, line in zip(lines, known, strict=True)])


def joined(pieces: Iterable[str]) -> Text:
    """Concatenate; a line that several pieces make up comes from the first of them that is not blank on it."""
    pieces = list(pieces)
    origins: list[Position] = []
    open_line = ""
    for piece in pieces:
        if not piece:
            continue
        own = piece.origins if isinstance(piece, Text) and piece.origins else (UNKNOWN,) * (piece.count("\n") + 1)
        first, newline, _ = piece.partition("\n")
        if origins and (open_line.strip() or not (first.strip() or newline)):
            own = own[1:]
        elif origins:
            origins.pop()
        origins += own
        last = piece.rpartition("\n")[2]
        open_line = last if newline else open_line + first
    return Text("".join(pieces), origins or [UNKNOWN])


def stripped(text: str, characters: str | None = None) -> str:
    """Strip as ``str.strip`` does, and keep the origins of the lines that stay."""
    result = text.strip(characters)
    if not isinstance(text, Text):
        return result
    start = text.count("\n", 0, len(text) - len(text.lstrip(characters)))
    return Text(result, text.origins[start : start + result.count("\n") + 1])
