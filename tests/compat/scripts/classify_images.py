"""Train a small vision transformer on the handwritten digits that scikit-learn brings."""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from transformers import Trainer, TrainerCallback, TrainingArguments  # isort: skip


class Digits(Dataset):
    def __init__(self, images, targets):
        self.images = torch.tensor(images, dtype=torch.float32)[:, None] / 8.0 - 1.0
        self.targets = targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.targets[index])}


class KeepLearningRates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def compute_metrics(eval_pred):
    return {"accuracy": float((np.argmax(eval_pred.predictions, -1) == eval_pred.label_ids).mean())}


def main(output_dir):
    digits = load_digits()
    train_dataset = Digits(digits.images[:600], digits.target[:600])
    eval_dataset = Digits(digits.images[600:750], digits.target[600:750])
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    keep = KeepLearningRates()
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_grad_norm=1.0,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            save_steps=20,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=compute_metrics,
        callbacks=[keep],
    )
    trainer.train()
    return {"history": trainer.state.log_history, "eval": trainer.evaluate(), "rates": keep.rates}


if __name__ == "__main__":
    main(sys.argv[1])
