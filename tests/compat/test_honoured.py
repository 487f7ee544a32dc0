"""Every field is read somewhere, or refused, or says that it is for somebody else."""

import ast
import dataclasses
from pathlib import Path

import pytest

from forgather.ml.trainer.arguments import TrainingArguments

pytest.importorskip("forgather.ml.trainer.trainer", reason="the trainer is what reads them")

SOURCES = Path(__file__).parents[2] / "compat" / "forgather" / "ml" / "trainer"
DECLARING = {"legacy.py", "setters.py", "refusals.py"}
ELSEWHERE = ("For scripts", "For the Hub", "For Trackio", "For DistributedDataParallel")
"""How the help of a field begins that is read by a script, or where another argument, refused here, asks for it."""

INDIRECT = {
    "gradient_checkpointing": "the older name of another field",
    "gradient_checkpointing_kwargs": "the older name of another field",
    "run_name": "transformers' reporting callbacks read it",
    "project": "transformers' reporting callbacks read it",
    "fsdp_config": "read where fsdp is set",
    "ddp_backend": "read where there are several processes",
    "ddp_timeout": "read where there are several processes",
    "eval_use_gather_object": "read where there are several processes",
}


def names_read() -> set[str]:
    """What is read as an attribute, or by its name, outside the files that declare and translate fields."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        if path.name in DECLARING or path.parent.name == "fields":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_no_field_is_ignored() -> None:
    read = names_read()
    left = [
        field.name
        for field in dataclasses.fields(TrainingArguments)
        if field.name not in read
        and field.name not in TrainingArguments.refused
        and field.name not in INDIRECT
        and not field.metadata["help"].startswith(ELSEWHERE)
    ]
    assert left == []


def test_the_exceptions_are_still_needed() -> None:
    assert set(INDIRECT) <= {field.name for field in dataclasses.fields(TrainingArguments)}
