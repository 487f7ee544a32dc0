"""The pages say which test keeps which promise; a test that is renamed or removed takes its promise with it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`")
PLACES = sorted(
    {(page.name, *found) for page in (ROOT / "docs").glob("*.md") for found in NAMED.findall(page.read_text("utf-8"))}
)


def is_there(path: Path, names: list[str]) -> bool:
    """Look for a class or function by its name, and in it for the next one."""
    if not path.exists():
        return False
    inside: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in inside if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        inside = found[0].body
    return True


@pytest.mark.parametrize(("page", "path", "names"), PLACES, ids=lambda part: part.strip(":"))
def test_a_test_that_a_page_names_is_there(page: str, path: str, names: str) -> None:
    assert is_there(ROOT / path, names.split("::")[1:]), f"docs/{page} names {path}{names}, and there is none"


def test_the_page_of_checkpoints_names_tests() -> None:
    assert len([place for place in PLACES if place[0] == "checkpointing.md"]) >= 30


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_a_test_that_a_page_names_is_there", True),
        ("TestNothing::test_of_it", False),
        ("test_of_nothing", False),
        ("is_there::name", False),
    ],
)
def test_what_is_not_there_is_not_found(name: str, expected: bool) -> None:
    assert is_there(Path(__file__), name.split("::")) is expected
    assert not is_there(Path(__file__).with_name("test_nothing_at_all.py"), name.split("::"))
