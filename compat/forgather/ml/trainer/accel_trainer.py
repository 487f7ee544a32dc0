"""The trainer for several devices, one process to each."""

import logging
from typing import Any, Final

import torch

import forgather_fn as ff
from forgather.ml.trainer.base_trainer import BaseTrainer
from forgather.ml.trainer.parallel_arguments import AccelTrainingArguments
from forgather.ml.trainer.resuming import batch_of
from forgather.ml.trainer.sharing import Sharing
from forgather_fn.program import Program
from forgather_fn.world import World, known_to_all

logger = logging.getLogger(__name__)


_MAY_DIFFER: Final = (
    "output_dir", "logging_dir", "run_name", "report_to", "local_rank", "log_level", "log_level_replica",
    "disable_tqdm", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
)  # fmt: skip
"""Arguments that do not decide what is computed."""


class AccelTrainer(BaseTrainer):
    """Train on all devices of a launcher, with the numbers of one.

    A step consumes ``per_device_train_batch_size`` samples in each of its microbatches, of which there are
    ``gradient_accumulation_steps`` on each process. The microbatches of a step are numbered over all processes, so that
    a run is the same on 1, 2 or 4 of them if the product of processes and accumulation is. Each process reads its own.

    Args:
        args: As of :class:`~forgather.ml.trainer.base_trainer.BaseTrainer`.
        accelerator: Accelerate's object, which knows the processes and their devices; None makes one, with
            ``args.accelerator_args``.
        kwargs: As of :class:`~forgather.ml.trainer.base_trainer.BaseTrainer`.

    Raises:
        ValueError: Arguments contradict each other, or a launcher started several processes and Accelerate knows of
            one.

    Example:
        >>> import tempfile
        >>> rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(8)]
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": ((super().forward(x)[:, 0] - labels) ** 2).mean()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = AccelTrainingArguments(folder, max_steps=2, save_strategy="no", disable_tqdm=True, use_cpu=True)
        ...     trainer = AccelTrainer(model_init=lambda: Model(2, 1), args=args, train_dataset=rows)
        ...     result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        2
    """

    _arguments_class = AccelTrainingArguments

    def __init__(self, *args: Any, accelerator: Any = None, **kwargs: Any) -> None:
        self._given_accelerator = accelerator
        super().__init__(*args, **kwargs)

    def _join(self) -> World:
        """Let Accelerate find the processes, or take them from the accelerator that was given."""
        from forgather_fn.strategy.accelerated import PRECISIONS, accelerator_from
        from forgather_fn.strategy.processes import world_of

        args = self.args
        made = self._given_accelerator is None
        self.accelerator = accelerator_from(
            self._given_accelerator, args.for_accelerator() if made else args.accelerator_args
        )
        world = world_of(self.accelerator)
        if self.accelerator.device.type != args.device.type:
            raise ValueError(
                f"Accelerate computes on {self.accelerator.device}, and the arguments on {args.device}: give both the "
                "same, use_cpu=True and Accelerator(cpu=True), or neither"
            )
        precision = self.accelerator.mixed_precision  # which a launcher may have said
        if precision in PRECISIONS and not (args.bf16 or args.fp16):
            setattr(args, precision, True)
        if args.fp16:
            self.accelerator.scaler = self._scaler
        return world

    def _place_model(self) -> None:
        """Place it, with the values that it has on the first process."""
        super()._place_model()
        world = self._world
        if world.size == 1:
            return
        from torch import distributed

        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        for rank, other in enumerate(world.gather(shapes)):
            if other != shapes:
                raise ValueError(
                    f"the processes have built other models:\n  rank {world.rank}: {shapes}\n  rank {rank}: {other}"
                )
        with world.explained(), torch.no_grad():
            for tensor in tensors.values():
                if tensor.device.type == self.args.device.type:
                    distributed.broadcast(tensor, group=world.group, group_src=0)

    def _strategy(self, plan: ff.Plan) -> Program:
        return ff.accelerated(plan, accelerator=self.accelerator, reduction=self.args.reduction)

    def _sharing(self) -> Sharing:
        return Sharing(self._world, self._own_share, self.args.accelerator_config.dispatch_batches)

    def _check_args(self) -> None:
        """Look at the arguments once more, and refuse what several processes cannot do."""
        super()._check_args()
        self.args.check_processes(self._world.size)
        mine = {name: value for name, value in self.args.to_dict().items() if name not in _MAY_DIFFER}
        for rank, other in enumerate(self._world.gather(mine)):
            unlike = [f"{name}={mine[name]!r} and {other[name]!r}" for name in mine if mine[name] != other[name]]
            if unlike:
                raise ValueError(
                    f"rank {self._world.rank} and rank {rank} were given other arguments, {'; '.join(unlike)}: give "
                    "all processes the same. No seed has to differ: what a process draws depends on its microbatches"
                )

    def _keep_batch(self, resumed: str) -> None:
        """Make steps of as many microbatches as those of the run that is gone on with, on however many processes."""
        args, size = self.args, self._world.size
        before = self._world.first(lambda: batch_of(resumed))
        now = (self._microbatches, args.train_batch_size)
        if before is None or before == now or args.allow_batch_change or args.auto_find_batch_size:
            return
        microbatches, samples = before
        said = (
            f"{resumed} was trained with steps of {microbatches} microbatches of {samples} samples; these arguments "
            f"make steps of {now[0]} (gradient_accumulation_steps={args.gradient_accumulation_steps} on {size} "
            f"processes) of {now[1]}"
        )
        if samples != args.train_batch_size:
            fix = f"Go on with per_device_train_batch_size={samples // max(1, args.n_gpu)}"
        elif microbatches % size:
            said += f", and {microbatches} microbatches cannot be shared out evenly among {size} processes"
            fix = "Use a number of processes that divides them"
        else:
            fix = None
        if fix is not None:
            raise known_to_all(
                ValueError(f"{said}. {fix}; or, to train with another batch on purpose, give allow_batch_change=True")
            )
        self._accumulate = microbatches // size
        logger.log(
            logging.WARNING if self._world.main else logging.INFO,
            "%s. The steps stay as they were: gradient_accumulation_steps=%d is used. (allow_batch_change=True would "
            "change them.)",
            *(said, self._accumulate),
        )
