"""PipelineTrainer under real torchrun, on three processes and on one, with the numbers of Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

from forgather.ml import PipelineTrainer, PipelineTrainingArguments, Trainer, TrainingArguments
from forgather_fn.testing.processes import processes
from tests.pipeline.models import Plain, llama, words

ROOT = Path(__file__).parents[2]


def launched(folder: Path, processes: int) -> list[dict[str, Any]]:
    folder.mkdir()
    script = str(ROOT / "tests/compat/pipeline_script.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    ran = subprocess.run(
        [sys.executable, *torchrun, script, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def loss_function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def test_the_script_runs_under_torchrun_on_three_processes_and_on_one(tmp_path: Path) -> None:
    three, (one,) = launched(tmp_path / "three", 3), launched(tmp_path / "one", 1)
    torch.manual_seed(0)
    model = Plain(blocks=12)
    data = words(samples=32)
    rows = [{name: column[i] for name, column in data.items()} for i in range(32)]
    trainer = Trainer(
        model=model,
        loss_fn=loss_function,
        args=TrainingArguments(output_dir=str(tmp_path / "here"), report_to=[], disable_tqdm=True),
        train_dataset=rows,
    )
    loss = trainer.train().training_loss
    evaluated = trainer.evaluate(rows[:10])["eval_loss"]
    for told in (one, *three):
        assert (told["steps"], told["again"]) == (12, 14)
        assert told["loss"] == pytest.approx(loss, rel=1e-5)
        assert told["eval_loss"] == pytest.approx(evaluated, rel=1e-5)
    whole = sum(p.numel() for p in model.parameters())
    assert one["parameters"] == whole
    assert sum(told["parameters"] for told in three) == whole
    for folder in ("three", "one"):
        saved = load_file(tmp_path / folder / "model" / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-6)
    # The optimizer's state is in the file as torch writes it: one process goes on from what three have saved.
    trainer.args.max_steps = 14
    trainer.train(resume_from_checkpoint=str(tmp_path / "three/output/checkpoint-12"))
    went_on = load_file(tmp_path / "three/output/checkpoint-14/model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(went_on[name], tensor, rtol=0, atol=2e-6)


def on_meta(folder: str) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Train a model that no process ever has whole."""
    rank = os.environ.get("RANK", "0")
    trainer = (PipelineTrainer if folder.endswith("two") else Trainer)(
        model_init=lambda: llama(layers=4),
        args=PipelineTrainingArguments(
            output_dir=f"{folder}/{rank}",
            split_spec={"model.layers.1": "end"},
            pipeline_schedule="1f1b",
            construct_model_on="meta",
            max_steps=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[{name: column[i] for name, column in words(samples=16).items()} for i in range(16)],
    )
    numbers = sum(p.numel() for p in trainer.model.parameters())
    loss = trainer.train().training_loss
    return numbers, loss, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_models_on_the_meta_device_get_memory_for_their_stages_alone(tmp_path: Path) -> None:
    with processes(2) as pool:
        (few, loss, one), (more, same, other) = pool.run(on_meta, str(tmp_path / "two"))
    whole, expected, params = on_meta(str(tmp_path / "one"))
    assert loss == same == pytest.approx(expected, rel=1e-5)
    assert few + more == whole
    for name, tensor in params.items():
        torch.testing.assert_close((one | other)[name], tensor, rtol=0, atol=5e-6)


def in_bfloat16(folder: str) -> tuple[float, float, str]:
    def loss(logits: Any, labels: Any) -> Any:
        assert logits.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return loss_function(logits, labels)

    args = PipelineTrainingArguments(
        output_dir=f"{folder}/{os.environ.get('RANK', '0')}",
        split_spec={"layer.1": "end"},
        max_steps=2,
        save_strategy="no",
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    data = [{name: column[i] for name, column in words(samples=16).items()} for i in range(16)]
    trainer = PipelineTrainer(Plain(), args, train_dataset=data, loss_fn=loss)
    trained = trainer.train().training_loss
    found = trainer.predict(data[:4])
    return trained, found.metrics["test_loss"], str(found.predictions.dtype)


def test_stages_in_half_precision_give_losses_and_metrics_float32(tmp_path: Path) -> None:
    with processes(2) as pool:
        two = pool.run(in_bfloat16, str(tmp_path))
    one = in_bfloat16(str(tmp_path))
    for loss, evaluated, dtype in two:
        assert (loss, evaluated) == pytest.approx(one[:2], rel=1e-3)
        assert dtype == one[2] == "float32"


class Stopping(TrainerCallback):
    """Asks for the end after a step that differs between processes, as a clock would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= (2 if args.process_index == 0 else 1)
        return control


def stopped(folder: str) -> int:
    args = PipelineTrainingArguments(
        output_dir=f"{folder}/{os.environ['RANK']}",
        split_spec={"layer.1": "end"},
        max_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{name: column[i] for name, column in words(samples=16).items()} for i in range(16)]
    trainer = PipelineTrainer(Plain(), args, train_dataset=data, loss_fn=loss_function, callbacks=[Stopping()])
    return trainer.train().global_step


def test_all_stages_end_where_the_first_process_asks_for_it(tmp_path: Path) -> None:
    with processes(2) as pool:
        assert pool.run(stopped, str(tmp_path)) == [2, 2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"split_spec": None}, "args.split_spec says where"),
        ({"pipeline_chunks": 3}, "cannot be cut into n_microbatches=3"),
        ({"stages_per_rank": 2}, "makes 3 stages of 2 cuts, but stages_per_rank=2 on 1 processes are 2"),
        ({"pipeline_schedule": "bfs"}, "is not one of gpipe, 1f1b"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    arguments = {"output_dir": str(tmp_path), "split_spec": {"layer.1": "end", "layer.3": "end"}} | given
    with pytest.raises(ValueError, match=said):
        PipelineTrainer(Plain(), PipelineTrainingArguments(**arguments))
