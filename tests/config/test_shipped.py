"""The templates that come with the library: each renders, parses, and trains for some steps."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.config import build, parse, render, to_python
from forgather_fn.config.allow import check_allowed
from forgather_fn.config.commands.train import Trainer, start
from forgather_fn.config.graph import Call
from forgather_fn.config.load import load
from forgather_fn.config.sources import SHIPPED

ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.yaml"))
BLOCKS = ("trainer_args", "optimizer", "lr_scheduler", "loss", "callbacks", "distributed_env", "model", "datasets")
TINY = {
    "main.model.width": "16",
    "main.model.layers": "1",
    "main.model.heads": "2",
    "main.max_steps": "3",
    "context": "8",
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(path)


def test_what_was_promised_is_there():
    trainers = {"trainers/trainer.yaml", "trainers/accel_trainer.yaml", "trainers/pipeline_trainer.yaml"}
    assert trainers | {"projects/causal_lm.yaml", "projects/demo.yaml"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_needs_nothing_to_be_allowed(name):
    graph = parse(render(name))
    for node in graph.nodes:
        if isinstance(node, Call):
            check_allowed(node.target, ())
    compile(to_python(graph), name, "exec")
    assert build(graph, "meta").keys() == {"config_name", "config_description", "config_class"}


@pytest.mark.parametrize("name", ["trainers/plan.yaml", "trainers/trainer.yaml"])
def test_a_trainer_has_a_block_for_each_part(name):
    source = (SHIPPED / name).read_text()
    for block in BLOCKS:
        assert re.search(rf"^ *\[{block}\]$", source, re.MULTILINE), block


@pytest.mark.parametrize("name", ["projects/causal_lm.yaml", "projects/demo.yaml"])
def test_a_project_trains(name, text, tmp_path):
    training = load(name, {**TINY, "text": text, "output_dir": str(tmp_path / "run")}).build("main", ())
    final = training.train()
    assert final.step == 3
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert list((tmp_path / "run/checkpoints").iterdir())


def test_a_block_of_the_plan_is_replaced_by_a_child(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "-- extends 'projects/demo.yaml'\n"
        "[model]\n.model: &model !partial:forgather_fn.demo.model:Transformer {width: 8, layers: 1, heads: 1}\n"
        "[optimizer]\n.optimizer: &optimizer !call:forgather_fn:sgd {momentum: 0.9}\n"
        "[lr_scheduler]\n.lr_scheduler: &lr_scheduler !partial:forgather_fn.schedules:linear []\n"
        "[callbacks]\n    == super()\n.sinks: &sinks !dlist {console: !call:forgather_fn.reports:console []}\n"
        "[trainer_args]\n    == super()\n    max_steps: 2\n    microbatches: 2\n    compile: false\n"
    )
    loaded = load(str(tmp_path / "mine.yaml"), {"text": text, "context": "8", "output_dir": str(tmp_path / "run")})
    training = loaded.build("main", ())
    described = training.program.plan.describe()
    assert described["optimizer"].startswith("sgd(momentum=0.9")
    assert described["schedule"].startswith("linear(peak=0.003")
    assert described["microbatches"] == "2"
    assert training.train().step == 2


def test_the_wheel_contains_the_templates(tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "forgather_fn", source / "forgather_fn", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "compat", source / "compat", ignore=shutil.ignore_patterns("__pycache__"))
    (wheel,) = hatchling.WheelBuilder(str(source)).build(directory=str(tmp_path / "dist"))
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"forgather_fn/config/templates/{name}" for name in NAMES} <= set(held)


class Scores(torch.nn.Module):
    """A model that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.linear(self.first(x))
        return {"loss": torch.nn.functional.cross_entropy(scores, labels), "logits": scores}


def scores() -> torch.nn.Module:
    return Scores()


def samples() -> list[dict[str, object]]:
    return [{"x": torch.full((4,), float(i)), "labels": i % 3} for i in range(24)]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("trainer", ""),
        ("accel_trainer", ""),
        ("pipeline_trainer", "[split_spec]\n        first: end\n"),
    ],
)
def test_the_class_layer_trains(tmp_path, name, more):
    (tmp_path / "mine.yaml").write_text(
        f"-- extends 'trainers/{name}.yaml'\n"
        f"[model]\n.model: &model !partial:{__name__}:scores []\n"
        f"[datasets]\n.train_dataset: &train_dataset !call:{__name__}:samples []\n"
        ".eval_dataset: &eval_dataset ~\n.data_collator: &data_collator ~\n"
        "[trainer_args]\n    == super()\n    max_steps: 4\n    report_to: none\n    disable_tqdm: true\n"
        f"{more}"
    )
    loaded = load(str(tmp_path / "mine.yaml"), {"output_dir": str(tmp_path / "run"), "main.args.save_steps": "2"})
    trainer = loaded.build("main", [f"{__name__}:scores", f"{__name__}:samples"])
    assert isinstance(trainer, Trainer)
    assert start(trainer, False, changes=False).global_step == 4
    checkpoints = list_checkpoints(tmp_path / "run")
    assert [entry.step for entry in checkpoints] == [2, 4]
