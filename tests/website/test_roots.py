"""What is rewritten on the way from the repository to the site, and what is not."""

from pathlib import Path

import pytest

from website import roots
from website.roles import as_markdown

README = """# Name

Beginning, with a [page](docs/a.md#part).

## A loop of your own

ONE

![A picture,
of two lines.](docs/picture.svg)

## Left out

## A loop of stages

TWO

## Where to read on

THREE
"""


def test_landing_page_has_beginning_picture_and_sections_in_order() -> None:
    text = roots.landing(README)
    places = [text.index(part) for part in ("# Name", "![A picture", "ONE", "TWO", "THREE")]
    assert places == sorted(places)
    assert "Left out" not in text
    assert text.count("](docs/picture.svg)") == 1


@pytest.mark.parametrize(
    ("lost", "message"),
    [("## Where to read on", "no section 'Where to read on'"), ("![A picture,\n", "no picture")],
)
def test_landing_page_of_a_readme_that_changed_is_refused(lost: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roots.landing(README.replace(lost, ""))


MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


@pytest.mark.parametrize(
    ("source", "link", "on_the_site"),
    [
        ("README.md", "docs/a.md#part", "a.md#part"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("CONTRIBUTING.md", "docs/reference/b.md", "reference/b.md"),
        ("docs/a.md", "../CONTRIBUTING.md#lion", "contributing.md#lion"),
        ("docs/a.md", "reference/b.md", "reference/b.md"),
        ("docs/reference/b.md", "../../README.md", "../index.md"),
        ("docs/reference/b.md", "../a.md", "../a.md"),
        ("docs/a.md", "#part", "#part"),
        ("docs/a.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_lead_to_where_files_lie_on_the_site(source: str, link: str, on_the_site: str) -> None:
    assert roots.relinked(f"[x]({link})\n", source, MOVED) == f"[x]({on_the_site})\n"


def test_code_is_left_as_it_is() -> None:
    code = "```python\nlinks = '[x](docs/a.md)'\n```\n"
    text = f"[x](docs/a.md)\n\n{code}\n- [x](docs/a.md)\n\n  ````markdown\n  ```text\n  [x](docs/a.md)\n  ```\n  ````\n"
    rewritten = roots.relinked(text, "README.md", MOVED)
    assert rewritten == text.replace("[x](docs/a.md)\n\n`", "[x](a.md)\n\n`").replace("- [x](docs/a", "- [x](a")


def test_contents_and_reasons_are_left_out() -> None:
    text = (
        "# Title\n\n- [One](#one)\n- [Two](#two)\n\nText [one](#one).\n\n```python no-run: needs two machines\nx\n```\n"
    )
    assert roots.fitted(text) == "# Title\n\nText [one](#one).\n\n```python\nx\n```\n"


def test_scripts_are_shown_on_the_page_that_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('"""Do it.\n\nTwice.\n"""\n\nx = 1\n')
    (tmp_path / "two.py").write_text("x = 2\n")
    text = roots.unfolded("[one](one.py), [again](one.py), [two](two.py), [other](../one.py)\n", tmp_path)
    assert text == (
        "[one](#one), [again](#one), [two](#two), [other](../one.py)\n\n"
        "## one.py { #one }\n\nDo it.\n\nTwice.\n\n```python\nx = 1\n```\n\n"
        "## two.py { #two }\n\n\n\n```python\nx = 2\n```\n"
    )


def test_docstring_becomes_markdown() -> None:
    text = "As :func:`~a.b.f` or :class:`C`.\n\n.. code-block:: python\n\n    f(C)\n\nExample:\n    >>> f"
    assert as_markdown(text, "a.b", {"C"}) == (
        'As <autoref identifier="a.b.f" optional><code>f</code></autoref> or '
        '<autoref identifier="a.b.C" optional><code>C</code></autoref>.\n\n'
        "```python\nf(C)\n```\n\nExamples:\n    >>> f"
    )
