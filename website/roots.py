"""Pages of the site that are files of the repository's root, and the rewriting that fits Markdown to the site.

On a code host the same files are read as they are, so nothing here may be needed to understand them.
"""

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent

PAGES: Final = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root that are pages as they are, and where."""

LANDING: Final = ("A loop of your own", "A loop of stages", "Where to read on")
"""Sections of the README that the landing page has, below its beginning and the picture."""

_PICTURE: Final = re.compile(r"^!\[[^\]]*\]\([^)]+\)\n", re.MULTILINE)
_LINK: Final = re.compile(r"(?<=\]\()(?!#|https?:|mailto:)(?P<path>[^)#\s]+)")
_CONTENTS: Final = re.compile(r"^(?:- \[[^\]]+\]\(#[^)]+\)\n)+\n?", re.MULTILINE)
_INFO: Final = re.compile(r"^( *`{3,}[a-z]+) .*$", re.MULTILINE)

_SCRIPT: Final = re.compile(r"\]\((\w+)\.py\)")


def landing(readme: str) -> str:
    """Make the landing page of the README: its beginning, its picture, and some of its sections.

    Raises:
        ValueError: The README has no picture, or lacks one of the sections.
    """
    beginning, *rest = re.split(r"^## ", readme, flags=re.MULTILINE)
    sections = {text.partition("\n")[0]: text for text in rest}
    missing = [title for title in LANDING if title not in sections]
    picture = _PICTURE.search(readme)
    if missing or picture is None:
        raise ValueError(f"README.md has no {'picture' if picture is None else f'section {missing[0]!r}'}")
    body = "".join(f"## {sections[title]}" for title in LANDING).replace(picture.group(), "")
    return f"---\nhide: [navigation]\n---\n{beginning.rstrip()}\n\n{picture.group()}\n{body}"


def relinked(text: str, source: str, moved: dict[str, str]) -> str:
    """Point links at where files lie on the site.

    Args:
        text: Markdown.
        source: Where it lies in the repository, such as ``"docs/checkpointing.md"`` or ``"README.md"``.
        moved: Where pages lie on the site, by their path in the repository, relative to ``docs/``.
    """
    folder = posixpath.dirname(source)
    here = posixpath.dirname(moved.get(source, posixpath.relpath(source, "docs")))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        place = moved.get(target, posixpath.relpath(target, "docs"))
        return posixpath.relpath(place, here or ".")

    return _outside_fences(text, lambda part: _LINK.sub(link, part))


def fitted(text: str) -> str:
    """Leave out what the site has by itself: a page's table of contents, and the words behind a fence's language."""
    return _outside_fences(_INFO.sub(r"\1", text), lambda part: _CONTENTS.sub("", part))


def unfolded(text: str, folder: Path) -> str:
    """Show the scripts that a page links to on the page itself, below its text.

    Args:
        text: Markdown.
        folder: Where its scripts lie.
    """
    names = dict.fromkeys(_SCRIPT.findall(text))
    return "\n".join([_SCRIPT.sub(r"](#\1)", text), *(_shown(folder / f"{name}.py") for name in names)])


def _shown(script: Path) -> str:
    """Make a section of a script: what its docstring says, and its code."""
    code = script.read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(code)) or ""
    lines = code.splitlines()[ast.parse(code).body[0].end_lineno if words else 0 :]
    body = "\n".join(lines).strip("\n")
    return f"## {script.name} {{ #{script.stem} }}\n\n{words}\n\n```python\n{body}\n```\n"


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^ *(`{3,})[^\n]*\n.*?^ *\2 *$)", text, flags=re.MULTILINE | re.DOTALL)
    # re.split gives, in turn, what is outside, a fenced block, and its fence.
    return "".join(change(part) if place % 3 == 0 else part for place, part in enumerate(parts) if place % 3 != 2)
