"""Imports point one way, and what is heavy is imported where it is used."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import attrs
import pytest

import forgather_fn as ff

ROOT = Path(__file__).parent.parent
PACKAGE = "forgather_fn"

BASE = {
    "deferred",
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
    "wide",
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
    "alike",
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
    "reading",
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
LOOP = {"changes", "course", "endings", "loop", "observers", "stages", "statistics"}

BELOW: Final[Mapping[str, set[str]]] = {
    "base": set(),
    "recipe": {"base"},
    "data": {"base"},
    "reports": set(),
    "distributed": {"base"},
    "step": {"base", "recipe", "data"},
    "loop": {"base", "data", "reports", "step"},
    "diagnostics": {"base", "reports", "step", "loop"},
    "checkpoint": {"base", "recipe", "data", "step", "loop"},
    "pipeline": {"base", "recipe", "data", "step", "loop", "checkpoint"},
    "strategy": {"base", "recipe", "data", "distributed", "step", "loop", "checkpoint", "pipeline"},
    "public": {"base", "recipe", "data", "step", "loop", "checkpoint", "pipeline", "strategy"},
    "training": {"base", "recipe", "data", "reports", "step", "loop", "checkpoint", "control", "strategy"},
    "config": {"base", "reports", "distributed", "checkpoint", "public", "training"},
    "testing": {"base", "recipe", "data", "step", "loop", "checkpoint", "strategy"},
    "control": {"base", "reports", "step", "loop", "checkpoint"},
    "demo": {"base", "reports", "checkpoint", "public"},
    "command": {"base", "checkpoint", "config", "control", "demo", "distributed", "pipeline", "reports"},
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
    assert {"forgather_fn", "forgather_fn.flat", "forgather_fn.reports"} <= set(modules())
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


def loaded_by(script: str) -> set[str]:
    """Run a script in a fresh process; give the modules that it has loaded."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}\nprint(*sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split())


def test_importing_the_library_loads_nothing_heavy() -> None:
    more = loaded_by(f"import {PACKAGE} as ff; ff.Plan, ff.single, ff.fold") - loaded_by("import torch")
    assert f"{PACKAGE}.plan" in more
    assert sorted(filter(is_heavy, more)) == []


DEFERRED: Final = (PACKAGE, f"{PACKAGE}.checkpoint", f"{PACKAGE}.control", f"{PACKAGE}.pipeline")
"""Packages whose names are imported when they are first used."""


@pytest.mark.parametrize("package", DEFERRED)
def test_deferred_names_are_those_that_readers_see(package: str) -> None:
    script = f"""
import importlib, {package} as package
before = set(sys.modules)
assert dir(package) == sorted(package.__all__) == package.__all__, set(dir(package)) ^ set(package.__all__)
print({{name: (getattr(package, name), name in vars(package)) for name in package.__all__}})
"""
    assert "torch" in loaded_by(script)  # all of them can be imported, and one of them needs it
    readers = next(node for node in ast.walk(ast.parse(modules()[package].read_text())) if is_typing_only(node))
    module = importlib.import_module(package)
    for one in imports(ast.Module(readers.body, [])):  # type: ignore[attr-defined]  # it is an If
        where, _, name = one.name.rpartition(".")
        found = importlib.import_module(where)
        expected = getattr(found, name) if hasattr(found, name) else importlib.import_module(one.name)
        assert getattr(module, name) is expected
        assert name in module.__all__
    assert not {name for name in module.__all__ if f"{package}.{name}" in modules()} - NAMESPACES


NAMESPACES: Final = {
    *("adapters", "checkpoint", "control", "data", "diagnostics", "losses", "metrics"),
    *("optim", "reducers", "reports", "schedules", "testing", "transforms"),
}
"""Names that are packages; any other of a module's name would become the module when that is imported."""


@pytest.mark.parametrize("name", ["Plann", "nothing", "__wrapped__"])
def test_a_name_that_is_not_there_is_missing(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"^module 'forgather_fn' has no attribute '{name}'$") as caught:
        getattr(ff, name)
    assert (caught.value.name, caught.value.obj) == (name, ff)


def test_no_text_of_a_command_waits_for_torch() -> None:
    loaded_by("""
from forgather_fn.cli import COMMANDS, main
for asked in (["--help"], *([command, "--help"] for command in COMMANDS)):
    try:
        main(asked)
    except SystemExit as ended:
        assert ended.code == 0
    assert "torch" not in sys.modules, asked
""")


def test_nothing_loads_torch_at_once() -> None:
    assert "torch" not in loaded_by(f"import {PACKAGE}")
