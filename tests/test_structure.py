"""What keeps the library small enough to read: short files, short functions, few public names."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import forgather_fn as ff

ROOT = Path(__file__).parent.parent
FILES = [path for part in ("forgather_fn", "compat", "benchmarks") for path in sorted((ROOT / part).rglob("*.py"))]
LINES: Final = 400
CODE: Final = 60

LONG: Final = {
    "forgather_fn/optim/adam.py:_adam_family": "a record of closures, each of which is short",
    "forgather_fn/optim/schedule_free.py:schedule_free_adamw": "a record of closures, each of which is short",
    "forgather_fn/strategy/joined.py:joined": "a record of closures, each of which is short",
    "forgather_fn/strategy/program.py:assembled": "a record of closures, each of which is short",
    "forgather_fn/training.py:assembled": "its arguments are those of a configuration",
}
"""Functions of more lines than others may have, with the reason."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_functions_are_short() -> None:
    long = {f"{path.relative_to(ROOT)}:{name}" for path in FILES for name, lines in functions(path) if lines > CODE}
    assert long == set(LONG)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Give each function's name, and how many lines it has less its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


PUBLIC: Final = """
Aborted Batch CompileError ConsumedStateError Gradients Mean NonFiniteError Observer Optimizer Plan Preempted Program
Steps Stream Tick TrainState Transform
accelerated adam adamw adapters at at_end batches chain changing checkpoint clipped control controlled data diagnostics
difference early_stopped ema evaluated every every_seconds fold folded from_torch frozen group joined last lora losses
members memory metrics noise optim pipelined power_ema reducers refreshed_statistics report reports rollback saved
schedules serve sgd single stateless stopped_by swa testing transforms until
"""


def test_public_names_are_these() -> None:
    """A name that comes or goes is a decision: it is written here, in the reference, and in the changelog."""
    assert ff.__all__ == sorted(PUBLIC.split())
    assert all(hasattr(ff, name) for name in ff.__all__)
    assert dir(ff) == ff.__all__
