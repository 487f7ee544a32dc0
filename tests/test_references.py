"""Docstrings name other pieces by where they are; a piece that is renamed or moved takes the reference with it."""

import pkgutil
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "forgather_fn"
NAMED = re.compile(r":(?:class|func|meth|attr|mod|data):`~?(forgather_fn[\w.]*)`")
FOUND = sorted(
    {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in NAMED.findall(path.read_text())
    }
)


@pytest.mark.parametrize(("path", "name"), FOUND)
def test_what_a_docstring_names_is_there(path: str, name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


def test_there_are_references() -> None:
    assert len(FOUND) > 50
