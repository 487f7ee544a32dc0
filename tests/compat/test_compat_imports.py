"""What is imported with the class layer's parts, and what only where it is used."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("transformers", "accelerate", "datasets", "tensorboard", "torch._dynamo", "torch._inductor", "tqdm.auto")

SCRIPT = """
import sys
from forgather.ml.trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments
from forgather.ml.trainer.parallel_arguments import AccelTrainingArguments, PipelineTrainingArguments
from forgather.ml.trainer import callbacks, model_settings, optimizers, scheduling
from forgather.ml.distributed import DistributedEnvironment

given = {"eval_strategy": "epoch", "report_to": "all", "optim": "adafactor", "torch_compile": True, "use_cpu": True}
for kind in (TrainingArguments, Seq2SeqTrainingArguments, AccelTrainingArguments, PipelineTrainingArguments):
    kind("x", **given)
callbacks.CallbackHandler([callbacks.DefaultFlowCallback, callbacks.ProgressCallback, callbacks.TBLogger])
DistributedEnvironment(device="cpu")
print(*(name for name in sys.modules))
"""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize("name", HEAVY)
def test_arguments_and_callbacks_are_made_without(name: str, loaded: set[str]) -> None:
    assert "forgather.ml.trainer.arguments" in loaded
    assert name not in loaded


PACKAGES = ("forgather.ml", "forgather.ml.trainer", "forgather.ml.trainer.callbacks")


def stub(package: str) -> Path:
    return Path(str(importlib.import_module(package).__file__)).with_suffix(".pyi")


def typed(package: str) -> set[str]:
    """Collect the names that a type checker sees in a package."""
    found: set[str] = set()
    for one in ast.parse(stub(package).read_text()).body:
        assert isinstance(one, ast.ImportFrom)
        names = {alias.asname or alias.name for alias in one.names}
        found |= typed(str(one.module)) if names == {"*"} else names
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_names_that_a_type_checker_sees_are_those_that_are_loaded(package: str) -> None:
    module = importlib.import_module(package)
    assert typed(package) == set(module.__all__)
    assert {name for name in module.__all__ if getattr(module, name).__name__ != name} <= {"EvaluationStrategy"}
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Trainor'"):
        _ = module.Trainor


def test_importing_the_packages_imports_no_torch() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    script = f"import {', '.join(PACKAGES)}, sys; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, check=True)
