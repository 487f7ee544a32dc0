"""The recipes run, are short, and use what is public."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "docs" / "recipes"
RECIPES = sorted(ROOT.glob("*.py"))
NAMESPACES = {"checkpoint", "data", "diagnostics", "losses", "metrics", "optim", "reports", "schedules", "testing"}
"""What may be imported besides ``forgather_fn`` itself: the documented parts of it that have names of their own."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(recipe), run_name="__main__")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(recipe: Path) -> None:
    text = recipe.read_text()
    assert len(text.splitlines()) <= 40
    assert (ast.get_docstring(ast.parse(text)) or "").endswith(".")
    assert f"({recipe.name})" in (ROOT / "index.md").read_text(), "the page of recipes does not have it"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_needs_nothing_private(recipe: Path) -> None:
    assert list(private(ast.parse(recipe.read_text()))) == []


def private(tree: ast.AST) -> Iterator[str]:
    """Name what is taken from inside the library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forgather_fn"):
            part = (node.module or "").partition(".")[2]
            if part not in {"", *NAMESPACES}:
                yield f"from {node.module}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f".{node.attr}"


def test_what_is_private_is_found() -> None:
    planted = (
        "from forgather_fn.built import Built\nstate._arrays\nfrom forgather_fn.losses import mse\nsuper().__init__()"
    )
    assert list(private(ast.parse(planted))) == ["from forgather_fn.built", "._arrays"]
