"""The code in the pages runs: every fenced block of Python, page by page, in order, in one namespace.

A block that cannot run says why in its fence: three backticks, then ``python no-run: needs two machines``.
"""

import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page for pattern in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md") for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<info>[^`]*)$")
PYTHON_NAMES = {"python", "python3", "py", "pycon"}


@attrs.frozen
class Block:
    """Where a fenced block stands, what its fence says, and the code in it."""

    page: Path
    line: int
    info: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fenced(page: Path) -> Iterator[Block]:
    """Split a page into its fenced blocks; ``line`` is that of the opening fence, counted from 1."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for line, text in lines:
        opening = FENCE.match(text)
        if opening is None:
            continue
        closing = re.compile(rf"^ *{opening['fence']}{opening['fence'][0]}* *$")
        body = []
        for _, inner in lines:
            if closing.match(inner):
                break
            body.append(inner)
        else:
            raise ValueError(f"{page}:{line}: this fence is never closed")
        yield Block(page, line, opening["info"].strip(), textwrap.dedent("\n".join(body)))


def is_run(block: Block) -> bool:
    """Tell whether a block is code to run. One that looks like Python and is neither run nor excused is refused."""
    language, _, rest = block.info.partition(" ")
    if language != "python":
        if language.lower() in PYTHON_NAMES:
            raise ValueError(f"{block}: a block fenced as {language!r} would not be run: write 'python'")
        return False
    if not rest:
        return True
    if re.fullmatch(r"no-run:? +\S.*", rest):
        return False
    raise ValueError(f"{block}: expected 'python' or 'python no-run: REASON', got {block.info!r}")


def run(page: Path, namespace: dict[str, object]) -> None:
    """Run a page. Empty lines before the code give its errors the line numbers of the page."""
    for block in fenced(page):
        if is_run(block):
            code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
            exec(code, namespace)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    # What a page defines belongs to `__main__`, as in a script: it can be pickled, and the guard of a script is true.
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, main: types.ModuleType) -> None:
    run(page, vars(main))


def written(directory: Path, text: str) -> Path:
    page = directory / "page.md"
    page.write_text(textwrap.dedent(text), encoding="utf-8")
    return page


def test_blocks_share_a_namespace_in_order(tmp_path: Path, main: types.ModuleType) -> None:
    page = written(
        tmp_path,
        """
        ```python
        import pickle
        def one(): return 1
        ```
        - in a list:
          ```python
          two = pickle.loads(pickle.dumps(one))() + 1
          ```
        ````markdown
        ```text
        ```
        ```python
        two = "not code: it is quoted"
        ```
        ````
        ```text
        two = "not Python"
        ```
        ```python no-run: it would take a second machine
        two = "excused"
        ```
        """,
    )
    run(page, vars(main))
    assert vars(main)["two"] == 2


def test_failure_names_page_and_line(tmp_path: Path, main: types.ModuleType) -> None:
    page = written(tmp_path, "# Title\n\n```python\nx = 1\n\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(page, vars(main))
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(page), 6)


def test_syntax_error_names_page_and_line(tmp_path: Path, main: types.ModuleType) -> None:
    page = written(tmp_path, "```python\nx = 1\nx =\n```\n")
    with pytest.raises(SyntaxError) as error:
        run(page, vars(main))
    assert (error.value.filename, error.value.lineno) == (str(page), 3)


def test_warning_is_an_error(tmp_path: Path, main: types.ModuleType) -> None:
    page = written(tmp_path, "```python\nimport warnings\nwarnings.warn('old')\n```\n")
    with pytest.raises(UserWarning, match="old"):
        run(page, vars(main))


@pytest.mark.parametrize("info", ["python no-run", "python no-run:", "python norun: typo", "py", "Python", "pycon"])
def test_block_that_is_not_run_without_reason_is_refused(info: str, tmp_path: Path, main: types.ModuleType) -> None:
    page = written(tmp_path, f"text\n```{info}\nx = 1\n```\n")
    with pytest.raises(ValueError, match=r"page\.md:2: .*expected|page\.md:2: .*write 'python'"):
        run(page, vars(main))


def test_open_fence_is_refused(tmp_path: Path, main: types.ModuleType) -> None:
    page = written(tmp_path, "```python\nx = 1\n")
    with pytest.raises(ValueError, match=r"page\.md:1: this fence is never closed"):
        run(page, vars(main))
