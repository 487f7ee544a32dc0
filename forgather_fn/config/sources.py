"""Where templates come from: files inside a search path, and the named parts of such files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.config import bounds
from forgather_fn.config.errors import ConfigError, Position

SHIPPED: Final = Path(__file__).parent / "templates"
"""The templates that come with the library, which are found after all others."""

_PART: Final = re.compile(r"^#-{3,}[ \t]*([\w./]+)[ \t]*-{3,}[ \t]*$", re.MULTILINE)


@attrs.frozen
class Source:
    """A template: a file's main part, or a part of it that has a name.

    Attributes:
        name: Unique: the file's name, and for a part ``file#part``.
        file: The file's name.
        text: Of this part.
        line: The line of the file that the text begins at, counted from 1.
        lines: All lines of the file.
    """

    name: str
    file: str
    text: str
    line: int
    lines: tuple[str, ...] = attrs.field(repr=False)


def split(name: str, text: str) -> Iterator[tuple[str | None, Source]]:
    """Split a file into its main part, under None, and its named parts, each after a line ``#--- name ---``."""
    lines = tuple(text.split("\n"))
    part: str | None = None
    start = 0
    for separator in [*_PART.finditer(text), None]:
        stop = separator.start() if separator else len(text)
        own = name if part is None else f"{name}#{part}"
        yield part, Source(own, name, text[start:stop], text.count("\n", 0, start) + 1, lines)
        if separator:
            part, start = separator[1], min(separator.end() + 1, len(text))


@attrs.define(eq=False)
class Sources:
    """The templates of one rendering, and those that it used.

    Attributes:
        path: Folders that are searched, in order.
        files: The text of each file that was used, by name.
        loaded: Each template that was loaded, by its unique name.
        parts: The unique names of the templates that a part's name may mean.
        references: Pairs of a template and one that it asked for.
    """

    path: Sequence[Path]
    files: dict[str, str] = attrs.field(factory=dict)
    loaded: dict[str, Source] = attrs.field(factory=dict)
    parts: dict[str, list[str]] = attrs.field(factory=dict)
    references: dict[tuple[str, str], None] = attrs.field(factory=dict)

    def add(self, name: str, text: str) -> None:
        """Take a file's text, by the name that it will be known under.

        Raises:
            ConfigError: It is too large, or there are too many.
        """
        if len(text) > bounds.SOURCE:
            raise ConfigError(f"template {name} has {len(text):,} characters; at most {bounds.SOURCE:,} are allowed")
        if len(self.files) >= bounds.TEMPLATES:
            raise ConfigError(f"more than {bounds.TEMPLATES} templates are used")
        self.files[name] = text
        for part, source in split(name, text.replace("\r\n", "\n")):
            if part is None:
                self.loaded[name] = source
                continue
            if source.name in self.loaded:
                raise ConfigError(f"part {part!r} is there twice", Position(name, source.line))
            self.loaded[source.name] = source
            self.parts.setdefault(part, []).append(source.name)

    def locate(self, name: str, parent: str) -> str:
        """Give the unique name of what a template asks for.

        A part of the same file comes first, then a part of another file that is in use, then a file.

        Raises:
            ConfigError: Two other files have such a part.
        """
        found = self._named(name, parent)
        self.references[parent, found] = None
        return found

    def _named(self, name: str, parent: str) -> str:
        own = f"{parent.partition('#')[0]}#{name}"
        if name in self.loaded or own in self.loaded:
            return own if own in self.loaded else name
        found = self.parts.get(name, [])
        if len(found) > 1:
            raise ConfigError(f"template {name!r} could be any of {', '.join(found)}: give the parts different names")
        return found[0] if found else name

    def load(self, name: str) -> Source:
        """Give a template, and read its file when it is asked for first.

        Raises:
            ConfigError: It is not in the search path, or would leave it, or cannot be read.
        """
        if name not in self.loaded:
            self.add(name, _read(_find(name, self.path)))
        return self.loaded[name]


def _find(name: str, path: Sequence[Path]) -> Path:
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ConfigError(f"template {name!r}: expected the name of a file inside the search path, without '..'")
    for folder in path:
        found = folder / name
        if found.is_file():
            if not found.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"template {name!r}: {found} leads out of the search path, to {found.resolve()}")
            return found
    places = "".join(f"\n    {folder}" for folder in path) or " nothing"
    raise ConfigError(f"template {name!r} was not found; searched:{places}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * bounds.SOURCE + 1).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
