"""A script as users write it; started by torchrun on three processes, and on one."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from forgather.ml import DistributedEnvironment, PipelineTrainer, PipelineTrainingArguments
from tests.pipeline.models import Plain, words


def loss_function(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def main() -> None:
    os.chdir(sys.argv[1])
    torch.manual_seed(0)
    model = Plain(blocks=12)
    data = words(samples=32)
    train_dataset = [{name: column[i] for name, column in data.items()} for i in range(32)]
    trainer = PipelineTrainer(
        model=model,
        distributed_env=DistributedEnvironment(),
        loss_fn=loss_function,
        args=PipelineTrainingArguments(
            output_dir="./output",
            split_spec={"layer.4": "end", "layer.8": "end"},
            pipeline_chunks=4,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
    )
    result = trainer.train()
    evaluated = trainer.evaluate(train_dataset[:10])
    trainer.save_model("./model")
    (saved,) = Path("./output").glob("checkpoint-*")
    trainer.args.max_steps = 14
    again = trainer.train(resume_from_checkpoint=str(saved)).global_step
    Path(f"rank{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(
            {
                "loss": result.training_loss,
                "steps": result.global_step,
                "again": again,
                "eval_loss": evaluated["eval_loss"],
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
