"""Every page is in the navigation, every link leads to a file, and every public name has its place in the reference."""

import ast
import importlib
import itertools
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from website import roots

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)

# Where users find names: the top level, the modules that it names, and these.
NAMESPACES = ("forgather_fn", "forgather_fn.config", "forgather_fn.pipeline", "forgather_fn.reports", "forgather.ml")


def navigated(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for value in entries.values():
            yield from navigated(value)
    elif isinstance(entries, list):
        for entry in entries:
            yield from navigated(entry)


def test_every_page_has_one_line_in_the_navigation() -> None:
    nav = list(navigated(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {"index.md", *roots.PAGES.values()}
    assert sorted(nav) == sorted(set(nav))
    assert pages - set(nav) == set(), "each needs a line under `nav` in mkdocs.yml"
    assert set(nav) - pages == set(), "mkdocs.yml: `nav` names what is not there"


def prose(page: str | Path) -> str:
    """Read a page without its code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^ *(`{3,}).*?^ *\1", "", text, flags=re.MULTILINE | re.DOTALL)


def slugs(titles: list[str]) -> list[str]:
    """Give the anchors of headings, as code hosts and the site do."""
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def anchors(page: Path) -> set[str]:
    text = prose(page)
    return {*slugs(re.findall(r"^#+ (.+)$", text, re.MULTILINE)), *DIRECTIVE.findall(text)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", prose(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_tables_stand_apart(page: str) -> None:
    """A table is one only after an empty line; otherwise it is text of the paragraph before."""
    kinds = [line[:1] if line[:1] in "|" else "text" if line else "" for line in prose(page).split("\n")]
    assert [line for line, pair in enumerate(itertools.pairwise(kinds), 1) if set(pair) == {"|", "text"}] == []


@pytest.mark.parametrize("page", PAGES)
def test_contents_list_every_section_in_order(page: str) -> None:
    text = prose(page)
    listed = re.findall(r"^- \[[^\]]+\]\(#([^)]+)\)$", text, re.MULTILINE)
    assert not listed or listed == slugs(re.findall(r"^## (.+)$", text, re.MULTILINE))


def public(namespace: str) -> dict[str, object]:
    """Give what a module offers: what ``__all__`` says, or else each ``import X as X``; and what its modules offer."""
    module = importlib.import_module(namespace)
    names = getattr(module, "__all__", None)
    if names is None:
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        imports = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        names = [alias.name for alias in imports if alias.asname == alias.name]
    found: dict[str, object] = {}
    for name in names:
        value = getattr(module, name)
        found |= public(value.__name__) if isinstance(value, types.ModuleType) else {f"{namespace}.{name}": value}
    return found


def resolved(path: str) -> object | None:
    """Find the object of a dotted path, None if there is none; a function comes before the module that has its name."""
    parent, _, name = path.rpartition(".")
    try:
        holder = importlib.import_module(parent)
    except ModuleNotFoundError:
        return getattr(resolved(parent), name, None)
    return getattr(holder, name, None)


def test_every_public_name_is_in_the_reference_once() -> None:
    paths = [path for page in REFERENCE for path in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]
    assert sorted(paths) == sorted(set(paths)), "a name is in the reference once"
    found = {path: resolved(path) for path in paths}
    assert [path for path, value in found.items() if value is None] == [], "docs/reference/ names what is not there"
    documented = {id(value) for value in found.values()}
    missing = [
        name for namespace in NAMESPACES for name, value in public(namespace).items() if id(value) not in documented
    ]
    assert missing == [], "each needs a line `::: NAME` in a page of docs/reference/"
