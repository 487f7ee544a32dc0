"""What is imported with the class layer's parts, and what only where it is used."""

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
