"""The demonstration on a pipeline ends at the same weights on two processes as on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forgather_fn.demo import Settings
from forgather_fn.demo.model import Transformer
from forgather_fn.demo.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n} times {n} is {n * n}" for n in range(2000)))
    return path


def small(text: Path, run: Path) -> dict[str, object]:
    return {"data": text, "run": run, "steps": 6, "context": 16, "width": 16, "layers": 4, "heads": 2, "pipeline": 2}


def test_two_processes_end_at_the_fingerprint_of_one(text, tmp_path) -> None:
    one = train(Settings(**small(text, tmp_path / "one")))
    options = [f"--{name}={value}" for name, value in small(text, tmp_path / "two").items()]
    command = [sys.executable, "-m", "forgather_fn", "launch", "-n", "2", "--cpu", "-m", "forgather_fn", "demo"]
    ran = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert re.findall("fingerprint: (.*)", ran.stdout) == [one]  # told once
    whole = sum(parameter.numel() for parameter in Transformer(width=16, layers=4, heads=2).parameters())
    assert f"model  {whole:,} parameters" in ran.stdout
    assert (tmp_path / "two/checkpoints/checkpoint-6/model-00002-of-00002.safetensors").exists()


@pytest.mark.parametrize("stages", [1, 5])
def test_stages_that_cannot_be_are_refused(text, tmp_path, stages) -> None:
    with pytest.raises(ValueError, match=f"pipeline={stages}: 4 layers cannot be cut"):
        train(Settings(**small(text, tmp_path) | {"pipeline": stages}))
