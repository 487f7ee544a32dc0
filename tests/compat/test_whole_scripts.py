"""Scripts that users of transformers would recognise run with only the import line different, with equal results."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parent / "scripts"
TIMES = ("runtime", "per_second")


def run(name, ours, *args):
    """Run a script's ``main``; with ours, the one line that imports the trainer is another."""
    text = (SCRIPTS / f"{name}.py").read_text()
    lines = [line for line in text.splitlines() if line.endswith("# isort: skip")]
    assert len(lines) == 1
    if ours:
        text = text.replace(lines[0], lines[0].replace("from transformers import", "from forgather.ml import"))
    scope = {"__name__": f"script_{name}", "__file__": str(SCRIPTS / f"{name}.py")}
    exec(compile(text, str(SCRIPTS / f"{name}.py"), "exec"), scope)
    return scope["main"](*args)


def compare(mine, theirs, tolerance, path=""):
    """Compare results: the same structure, and the same numbers but for times."""
    assert type(mine) is type(theirs) or {type(mine), type(theirs)} <= {int, float}, path
    if isinstance(theirs, dict):
        assert set(mine) == set(theirs), path
        for name in theirs:
            if not any(word in name for word in TIMES):
                compare(mine[name], theirs[name], tolerance, f"{path}/{name}")
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), path
        for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            compare(one, other, tolerance, f"{path}/{i}")
    elif isinstance(theirs, np.ndarray | torch.Tensor):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance, err_msg=path)
    elif isinstance(theirs, float):
        assert math.isclose(mine, theirs, rel_tol=tolerance, abs_tol=1e-9), (path, mine, theirs)
    else:
        assert mine == theirs, path


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.name != "manifest.json")


@pytest.mark.parametrize("name", ["causal_lm", "classify_text", "classify_images"])
def test_a_script_runs_under_both_trainers(name, tmp_path):
    results = []
    for ours in (True, False):
        folder = tmp_path / ("a" if ours else "b")
        if name == "causal_lm":
            argv = [
                "--output_dir", str(folder), "--do_train", "--do_eval", "--num_train_epochs", "2", "--use_cpu",
                "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "3e-3",
                "--warmup_steps", "5", "--weight_decay", "0.1", "--logging_steps", "5", "--eval_strategy", "steps",
                "--eval_steps", "10", "--save_steps", "10", "--save_total_limit", "2", "--report_to", "none",
            ]  # fmt: skip
            results.append(run(name, ours, argv))
        else:
            results.append(run(name, ours, str(folder)))
    compare(*results, tolerance=2e-3 if name == "classify_images" else 5e-4)
    assert entries(tmp_path / "a") == entries(tmp_path / "b")
    assert os.path.isdir(tmp_path / "a")
