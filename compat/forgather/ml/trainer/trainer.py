"""The trainer for one device."""

import forgather_fn as ff
from forgather.ml.trainer.base_trainer import BaseTrainer
from forgather_fn.program import Program


class Trainer(BaseTrainer):
    """Train on one device; see :class:`~forgather.ml.trainer.base_trainer.BaseTrainer` for its arguments.

    Example:
        >>> import tempfile, torch
        >>> from forgather.ml.trainer.arguments import TrainingArguments
        >>> rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(8)]
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": ((super().forward(x)[:, 0] - labels) ** 2).mean()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=2, save_strategy="no", disable_tqdm=True, use_cpu=True)
        ...     trainer = Trainer(model=Model(2, 1), args=args, train_dataset=rows)
        ...     result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        2
    """

    def _strategy(self, plan: ff.Plan) -> Program:
        return ff.single(plan)
