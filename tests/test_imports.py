"""Imports point one way, and what is heavy is imported where it is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import attrs
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "forgather_fn"

BASE = {
    "describe",
    "fingerprint",
    "finite",
    "flat",
    "hyper",
    "importing",
    "interrupt",
    "layout",
    "mean",
    "portion",
    "random",
    "reducers",
    "signature",
    "state",
    "terminal",
    "tree",
    "turn",
    "world",
}
RECIPE = {
    "activation_checkpointing",
    "activation_offloading",
    "average",
    "gradient",
    "groups",
    "losses",
    "metrics",
    "neftune",
    "optim",
    "scaling",
    "schedules",
    "transforms",
}
DATA = {"data", "share"}
STEP = {
    "adapters",
    "agreement",
    "allocations",
    "batch",
    "binding",
    "blank",
    "built",
    "compilable",
    "compiled",
    "compiler",
    "conversion",
    "dispatch",
    "estimate",
    "evaluation",
    "execution",
    "fsdp",
    "functional",
    "graphs",
    "in_backward",
    "joining",
    "meta",
    "model",
    "overlap",
    "parcel",
    "plan",
    "program",
    "reduction",
    "replicated",
    "replicated_graphs",
    "sharded",
    "shards",
    "step",
    "tally",
    "wanted",
    "workspace",
}
LOOP = {"changes", "endings", "loop", "observers", "stages", "statistics"}

BELOW: Final[Mapping[str, set[str]]] = {
    "base": set(),
    "recipe": {"base"},
    "data": {"base"},
    "report": set(),
    "distributed": {"base"},
    "step": {"base", "recipe", "data"},
    "loop": {"base", "data", "report", "step"},
    "diagnostics": {"base", "report", "step", "loop"},
    "checkpoint": {"base", "recipe", "data", "step", "loop"},
    "pipeline": {"base", "recipe", "data", "step", "loop", "checkpoint"},
    "strategy": {"base", "recipe", "data", "distributed", "step", "loop", "checkpoint", "pipeline"},
    "public": {"base", "recipe", "data", "step", "loop", "checkpoint", "pipeline", "strategy"},
    "training": {"base", "recipe", "data", "report", "step", "loop", "checkpoint", "control", "strategy"},
    "config": {"base", "report", "distributed", "checkpoint", "public", "training"},
    "testing": {"base", "recipe", "data", "step", "loop", "checkpoint", "strategy"},
    "control": {"base", "report", "step", "loop", "checkpoint"},
    "demo": {"base", "report", "checkpoint", "public"},
    "command": {"base", "checkpoint", "config", "control", "demo", "distributed", "pipeline", "report"},
}
"""For each layer, those that it may import from, besides itself. docs/architecture.md draws them."""

HEAVY = {
    "accelerate",
    "lightning",
    "matplotlib",
    "mlflow",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
    "tqdm",
    "trackio",
    "transformers",
    "wandb",
}


@attrs.frozen
class Import:
    """One import statement: what it names, and whether it runs with the module or only later, in a function."""

    name: str
    line: int
    at_once: bool


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(node: ast.AST, at_once: bool = True) -> Iterator[Import]:
    """Give every import that can run; those for the type checker alone cannot."""
    for child in ast.iter_child_nodes(node):
        if is_typing_only(child):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_once) for alias in child.names)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, at_once and not later)


@cache
def modules() -> Mapping[str, Path]:
    """Find the package's modules by their dotted names."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def module_of(name: str) -> str | None:
    """Find the module that an imported name is, or is in; None if it is not one of the package's."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(imports(ast.parse(modules()[module].read_text(encoding="utf-8"))))


def own_imports(module: str, *, at_once: bool) -> set[str]:
    """Name the package's modules that a module imports: at once, or at any time."""
    used = [one for one in imports_of(module) if one.at_once or not at_once]
    return {found for one in used if (found := module_of(one.name)) is not None} - {module}


def layer(module: str) -> str:
    """Name the layer of a module. One that is in none is refused: a new module is put in its place in this file."""
    first = module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]
    named = {"base": BASE, "recipe": RECIPE, "data": DATA, "step": STEP, "loop": LOOP}
    named |= {"public": {""}, "command": {"cli", "completion", "__main__"}}
    for name, members in named.items():
        if first in members:
            return name
    assert first in BELOW, f"{module} is in no layer: add it to one in {Path(__file__).name}"
    return first


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    own = layer(module)
    for one in imports_of(module):
        used = module_of(one.name)
        if used is not None and layer(used) != own:
            assert layer(used) in BELOW[own], f"{modules()[module]}:{one.line}: {own} imports {used} ({layer(used)})"


def test_layers_are_in_order() -> None:
    tuple(TopologicalSorter(BELOW).static_order())  # raises CycleError


def test_no_cycles() -> None:
    # A package counts as importing what its __init__ does, and a module as importing the packages that it lies in:
    # that is what Python runs. The root is left out, since everything lies in it.
    def runs(module: str) -> set[str]:
        used = own_imports(module, at_once=True)
        around = {name.rpartition(".")[0] for name in used}
        return (used | around) & set(modules()) - {PACKAGE, module, module.rpartition(".")[0]}

    tuple(TopologicalSorter({module: runs(module) for module in modules()}).static_order())  # raises CycleError


def test_all_modules_are_seen() -> None:
    assert {"forgather_fn", "forgather_fn.flat", "forgather_fn.report"} <= set(modules())
    assert "forgather_fn.plan" in own_imports("forgather_fn.loop", at_once=True)
    assert "forgather_fn.loop" not in own_imports("forgather_fn.plan", at_once=False)  # for the type checker alone


def test_nothing_here_imports_the_class_layer() -> None:
    for module in modules():
        assert not [one for one in imports_of(module) if one.name.partition(".")[0] == "forgather"], module


def is_heavy(name: str) -> bool:
    return any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY)


@pytest.mark.parametrize("module", modules())
def test_heavy_imports_wait_until_used(module: str) -> None:
    # torch imports tqdm itself, so that looking at what was loaded, as the test below does, could not tell.
    if layer(module) == "demo":
        return
    assert [one for one in imports_of(module) if one.at_once and is_heavy(one.name)] == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    script = f"import sys, torch; before = set(sys.modules); import {PACKAGE}; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    names = loaded.stdout.split()
    assert f"{PACKAGE}.plan" in names
    assert sorted(filter(is_heavy, names)) == []
