"""The trainer for models that are cut into stages, one or several to a process."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather.ml.trainer.base_trainer import BaseTrainer
from forgather.ml.trainer.counting import batch_size_of
from forgather.ml.trainer.model_settings import built
from forgather.ml.trainer.parallel_arguments import PipelineTrainingArguments
from forgather.ml.trainer.refusals import refuse_unhonoured
from forgather.ml.trainer.stepping import OVERRIDES
from forgather.ml.trainer.whole_optimizer import Spread
from forgather.ml.trainer.windows import Window
from forgather_fn.batch import microbatches
from forgather_fn.binding import unbind
from forgather_fn.data import Batch
from forgather_fn.meta import on_meta
from forgather_fn.pipeline.freeing import is_freed
from forgather_fn.program import Program
from forgather_fn.state import TrainState
from forgather_fn.strategy.processes import launched_on
from forgather_fn.world import ALONE, World


class PipelineTrainer(BaseTrainer):
    """Train a model that is cut into stages; on one process, as :class:`~forgather.ml.Trainer` does.

    Each process keeps the parameters, and the optimizer, of its stages alone: ``trainer.model`` is the whole tree of
    modules, in which those of others are stand-ins without memory. Every process reads the same batches;
    ``per_device_train_batch_size`` is the whole batch, of which ``n_microbatches`` equal parts go through the stages.

    It takes what :class:`~forgather.ml.trainer.base_trainer.BaseTrainer` takes; its ``loss_fn`` is
    ``(logits, labels) -> mean``, whose weight is the number of labels that are not -100.

    Args:
        args: :class:`PipelineTrainingArguments`, with ``split_spec`` and ``n_microbatches``.

    Raises:
        ValueError: There is no ``split_spec``, or something is asked for that cannot be done on stages.
    """

    _arguments_class = PipelineTrainingArguments

    def __init__(self, model: nn.Module | None = None, args: Any = None, *more: Any, **named: Any) -> None:
        super().__init__(model, args, *more, **named)
        if not self.args.split_spec:
            raise ValueError("PipelineTrainer: args.split_spec says where the model is cut: {'layer.4': 'end'}")
        changed = [name for name in OVERRIDES if getattr(type(self), name) is not getattr(BaseTrainer, name)]
        if changed and self.args.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} overrides {', '.join(changed)}, which is not called where the model runs in "
                "stages; give loss_fn= instead"
            )

    def _strategy(self, plan: ff.Plan) -> Program:
        args = self.args
        plan = attrs.evolve(plan, microbatches=args.gradient_accumulation_steps * args.n_microbatches)
        return ff.pipelined(
            plan, args.split_spec, schedule=args.pipeline_schedule, stages_per_rank=args.stages_per_rank
        )

    def _rebuild_model(self) -> None:
        """Build the model, and let go of what belongs to other processes before the optimizer is made."""
        super()._rebuild_model()
        self._let_go(self.model)

    def _constructed(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build a model; one on the meta device gets memory and values for the stages of this process alone."""
        if self.args.world_size == 1 or self.args.construct_model_on != "meta":
            return super()._constructed(build)
        model = built(build, self.args)
        self._let_go(model)
        return model

    def _let_go(self, model: nn.Module) -> None:
        """Free a model of the stages of other processes; its optimizer is made afterwards."""
        if self.args.world_size > 1 and not is_freed(model):
            plan = ff.Plan(
                model=model,
                loss=ff.losses.cross_entropy,
                optimizer=ff.sgd(),
                schedule=0.0,
                init="by_name" if on_meta(model) else "as_built",
                device=self.args.device,
            )
            self._strategy(plan).init(self.args.seed)
            unbind(model)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Count the samples of one step: every process reads the same."""
        return int(self._train_batch_size * args.gradient_accumulation_steps)

    def _join(self) -> World:
        """Train as one process does: those that a launcher started are parts of one pipeline, and see the same data."""
        return ALONE

    @property
    def _peers(self) -> World:
        """The processes of the pipeline: they end, save and evaluate together."""
        return launched_on(self.args.device) if self.args.world_size > 1 else ALONE

    def _check_args(self) -> None:
        refuse_unhonoured(self.args)

    def _wants_halves(self) -> bool:
        halves = super()._wants_halves()
        if halves and self.args.world_size > 1:
            raise ValueError(
                "a callback that listens to events inside a step, or a scheduler that looks at gradients, cannot be "
                "where the model runs in stages: no process has all gradients"
            )
        return halves

    def _window(self, batches: list[Any], items: Any) -> Window:
        """Make the microbatches of the next step: so many parts of each batch, which every process has read."""
        return super()._window([part for batch in batches for part in self._cut(batch)], items)

    def _cut(self, batch: Any) -> list[Any]:
        samples = batch_size_of(batch)
        if samples is None:
            raise ValueError("a batch without a tensor cannot be cut into microbatches")
        count = min(self.args.n_microbatches, samples)  # the last batch of an epoch may be small
        return microbatches(Batch(batch, samples, None), count)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the model on a batch without gradients, through all stages; every process gets the outputs."""
        if self.args.world_size > 1:
            model = _Whole(*self._running())
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _running(self) -> tuple[Program, TrainState]:
        """Give the program whose model this is; one is made where no training runs."""
        if self._engine is None:
            self._let_go(self.model)
            self.create_optimizer()
            self._open_engine(0)
        assert self._engine is not None
        return self._engine.program, self._engine.state

    _gathered: tuple[nn.Module, dict[str, Any] | None] | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, gathered from all processes, as :class:`~forgather.ml.Trainer` does; collective."""
        if self.args.world_size == 1:
            super().save_model(output_dir, _internal_call)
            return
        whole = self._gathered[0] if self._gathered is not None else self._whole_model()
        if self.args.should_save:
            own, self.model = self.model, whole
            try:
                self._save(output_dir)
            finally:
                self.model = own

    def _whole_model(self) -> nn.Module:
        program, state = self._running()
        return program.export(state)

    def _spread(self) -> Spread:
        program, _ = self._running()
        part = program.portion()
        assert part is not None
        return Spread(self.optimizer, self.model, program.world, part.order)

    def _commit_checkpoint(self) -> None:
        """Gather model and optimizer on every process; the first one writes, and if it fails, all fail."""
        if self.args.world_size == 1:
            super()._commit_checkpoint()
            return
        keeps = not self.args.save_only_model and self.args.save_optimizer_state
        self._gathered = self._whole_model(), self._spread().state_dict() if keeps else None
        program, _ = self._running()
        try:
            self.state.best_model_checkpoint = program.world.each(self._commit_own)[0]
        finally:
            self._gathered = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        own = self.optimizer
        if self._gathered is not None and self._gathered[1] is not None:
            self.optimizer = _Told(self._gathered[1])
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = own

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        own = self.optimizer
        if self.args.world_size > 1 and checkpoint is not None:
            self.optimizer = self._spread_before_training()
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer = own

    def _spread_before_training(self) -> Spread:
        """Know the whole before there is an engine, which takes the optimizer's slots over as they are."""
        spread = self._spread()
        self._close_engine()
        return spread

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read this process's weights out of those of the whole."""
        log = logging.getLogger("forgather.ml.trainer.weights")
        level = log.level
        if self.args.world_size > 1:
            log.setLevel(logging.ERROR)  # it would warn of the weights of other processes
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            log.setLevel(level)


@attrs.frozen(eq=False)
class _Told:
    """An optimizer that has been asked for its state already."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state


class _Whole(nn.Module):
    """The model of all stages, to be called."""

    def __init__(self, program: Program, state: TrainState) -> None:
        super().__init__()
        self.call = functools.partial(program.apply, state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give the outputs of the last stage."""
        with torch.no_grad():
            return self.call(*args, **kwargs)
