"""The training loop: epochs, steps and events, in the order of transformers.Trainer.

What "step" counts: ``state.global_step`` is the number of updates made; a step is one update, of
``gradient_accumulation_steps`` microbatches on each process.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from forgather.ml.trainer.agreeing import agreed, telling
from forgather.ml.trainer.between import BetweenMixin, out_of_memory
from forgather.ml.trainer.data import Lengths
from forgather.ml.trainer.feed import closing, feed
from forgather.ml.trainer.logs import Losses
from forgather.ml.trainer.model_settings import align_special_tokens, model_settings
from forgather.ml.trainer.position import PositionMixin
from forgather.ml.trainer.preemption import noting_preemption
from forgather.ml.trainer.running import Running
from forgather.ml.trainer.stepping import SteppingMixin, StoppedInsideError
from forgather.ml.trainer.surroundings import finite_outputs, surroundings
from forgather.ml.trainer.trainer_types import TrainerState, TrainOutput, speed_metrics
from forgather.ml.trainer.windows import Window
from forgather_fn.binding import unbind
from forgather_fn.state import NonFiniteError
from forgather_fn.world import known_to_all

logger = logging.getLogger(__name__)


class LoopMixin(SteppingMixin, BetweenMixin, PositionMixin):
    """The part of a trainer that trains."""

    _preempted: Callable[[], bool]

    def _keep_batch(self, resumed: str) -> None:
        """Look whether a step is what it was in the run that is gone on with; one process takes it as it is told."""

    def _check_args(self) -> None:
        raise NotImplementedError

    def _rebuild_model(self) -> None:
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | os.PathLike[str] | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        With ``model``, a second call goes on from the weights and the optimizer's slots, and starts steps, schedule and
        data anew; with ``model_init``, everything is built anew.

        Args:
            resume_from_checkpoint: A checkpoint directory; True for the newest whole one of ``output_dir``.
            trial: Refused: there is no search of hyperparameters.
            ignore_keys_for_eval: Names of outputs that are no predictions.

        Returns:
            The number of updates made in all, the mean loss of this call, and metrics.

        Raises:
            ValueError: There is no checkpoint to go on from, or arguments do not fit together.
            NonFiniteError: A loss or a gradient is not finite, and ``on_nonfinite`` is ``"raise"``.
        """
        if trial is not None:
            raise ValueError("train(trial=...) belongs to hyperparameter_search, which is not supported")
        self._check_args()
        self.is_in_train = True
        try:
            with surroundings(self.args), self._session(), noting_preemption(self.args) as asked, telling(self._peers):
                self._preempted = agreed(self._peers, asked, self.args.enable_jit_checkpoint)
                return self._train_with(resume_from_checkpoint, ignore_keys_for_eval)
        finally:
            self.is_in_train, self._run, self._accumulate = False, None, None
            self._close_engine()

    def _train_with(self, resume: Any, ignore_keys: list[str] | None) -> TrainOutput:
        """Train the model, built anew if it is built by a function, as arguments want it to be."""
        self._rebuild_model()
        align_special_tokens(self.model, self.processing_class)
        with model_settings(self.model, self.args), finite_outputs(self.model, self.args.debug):
            return self._train_in_batches(resume, ignore_keys)

    def _train_in_batches(self, resume: Any, ignore_keys: list[str] | None) -> TrainOutput:
        """Train, with smaller batches where memory runs out and that was asked for."""
        resumed = self._checkpoint_to_resume(resume)
        if resumed is not None:
            self._load_from_checkpoint(resumed)
            self._keep_batch(resumed)
        self._train_batch_size = (
            self._batch_size_of(resumed) if self.args.auto_find_batch_size else (self.args.train_batch_size)
        )
        while True:
            try:
                return self._train_from(resumed, ignore_keys)
            except (RuntimeError, MemoryError) as error:
                smaller = int(self._train_batch_size * 0.9)
                if not (self.args.auto_find_batch_size and out_of_memory(error)):
                    raise
                if smaller < 1:
                    raise RuntimeError("No executable batch size found, reached zero.") from error
                logger.warning("memory ran out; trying again with batches of %d samples", smaller)
                self._close_engine()
                self._train_batch_size = smaller

    def _train_from(self, resumed: str | None, ignore_keys: list[str] | None) -> TrainOutput:
        fed = feed(self.get_train_dataloader(), self.args.seed, self._sharing())
        lengths = Lengths(*self.set_initial_training_values(self.args, fed.loader))
        run = Running(
            lengths=lengths,
            feed=fed,
            losses=Losses(self._filters_nonfinite()),
            resumed=resumed,
            start=time.time(),
            first_step=0,
            last_logged=0,
            ignore_keys=ignore_keys,
        )
        self._run = run
        self._begin_state(run)
        self._make_ready(run)
        run.start = time.time()
        run.first_step = run.last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._tell(run)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self._callbacks_seen = -1
        if self.args.eval_on_start:
            self._evaluate(None, run.ignore_keys, skip_scheduler=True)
        for epoch in range(run.epoch, lengths.epochs):
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            self._pass_over_data(run, epoch)
            if self.control.should_training_stop:
                break
        return self._finish(run)

    def _tell(self, run: Running) -> None:
        """Log what is about to be done."""
        lengths = run.lengths
        logger.info("***** Running training *****")
        logger.info("  Num examples = %s", f"{lengths.examples:,}")
        logger.info("  Num Epochs = %s", f"{lengths.epochs:,}")
        logger.info("  Total train batch size (w. accumulation) = %s", f"{lengths.batch_size:,}")
        logger.info("  Gradient Accumulation steps = %s", self._own_accumulation)
        logger.info("  Total optimization steps = %s", f"{lengths.max_steps:,}")
        logger.info("  Number of trainable parameters = %s", f"{self.get_num_trainable_parameters():,}")
        if run.resumed is not None:
            logger.info("  Resuming from %s: epoch %d, step %d", run.resumed, run.epoch, self.state.global_step)

    def _begin_state(self, run: Running) -> None:
        """Make the state of a new training, or read that of the one that is gone on with."""
        self.state = TrainerState(stateful_callbacks=self._exportable())  # type: ignore[arg-type]
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, run.lengths.max_steps)
        if run.resumed is not None:
            self._resume_state(run.resumed)
            self._find_position(run)
        self.state.init_training_references(self, run.lengths.max_steps, run.lengths.epochs, None)

    def _make_ready(self, run: Running) -> None:
        """Make optimizer and scheduler, read theirs of a checkpoint, and put the model on a state."""
        self.current_flos, self._flops = 0.0, 0.0
        self._prepared, self._uses_items = True, None
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer_and_scheduler(num_training_steps=run.lengths.max_steps)
        if run.resumed is not None:
            self._load_optimizer_and_scheduler(run.resumed)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = run.feed.loader
        self._compare(run.lengths)
        self._open_engine(self.state.global_step)
        self._load_scaler_of(run.resumed)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make both; override it for ones of your own."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def _pass_over_data(self, run: Running, epoch: int) -> None:
        """Run one pass over the data, or the rest of it."""
        accumulate, per_epoch = self._microbatches, run.lengths.updates_per_epoch
        first = epoch == run.epoch and run.resumed is not None
        skip = run.skip if first else 0
        batches = run.opened if first and run.opened is not None else run.feed.open(epoch, skip)
        if first and run.resumed is not None:
            self._load_rng_state(run.resumed)
        seen, run.grad_norm, run.learning_rate = skip, None, None
        # Counts that are told to other processes must not wait for an accelerator.
        device = self.args.device if self._world.size == 1 else torch.device("cpu")
        rest = run.lengths.batches_per_epoch % accumulate or accumulate
        with closing(batches):
            for update in range(skip // accumulate, per_epoch):
                own = self._own_accumulation  # a callback may have changed it
                count = own if update != per_epoch - 1 else min(rest, own)
                window = self._window(*self.get_batch_samples(batches, count, device))
                if window.count:
                    seen += window.count
                    self._make_step(run, epoch, seen, window)
                if not window.count or self.control.should_epoch_stop or self.control.should_training_stop:
                    break
        if seen == 0:
            logger.warning(
                "There seems not to be a single sample in your epoch_iterator, stopping training at step %d! This is "
                "expected if you're using an IterableDataset and set num_steps (%d) higher than the number of "
                "available samples.",
                self.state.global_step,
                self.state.max_steps,
            )
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._look_up(run, epoch)

    def _make_step(self, run: Running, epoch: int, seen: int, window: Window) -> None:
        handler, args = self.callback_handler, self.args
        self.current_gradient_accumulation_steps = len(window.batches)
        self.control = handler.on_step_begin(args, self.state, self.control)
        if window.count > 1:
            self._agree()
        if window.count > 1 and (self.control.should_epoch_stop or self.control.should_training_stop):
            return  # asked for before the first microbatch: the step is not made
        updates = self._updates() if args.fp16 else None
        try:
            loss, run.grad_norm = self._step(window)
        except StoppedInsideError:
            return
        except NonFiniteError as error:
            self._show_nonfinite(known_to_all(error))
            raise
        run.losses.add(loss)
        run.learning_rate = self._get_learning_rate()
        if updates is None or updates != self._updates():  # not where float16 left the update out
            self._step_scheduler()
        if self._engine is not None and self._engine.halves:
            self.model.zero_grad()
        for batch in window.batches:
            self.current_flos += self.floating_point_ops(batch)
            self._track_num_input_tokens(batch)
        self.current_flos += window.all.flos - window.own.flos
        self.state.num_input_tokens_seen += int(window.all.tokens - window.own.tokens)
        every = args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self.state.global_step += 1
        self.state.epoch = epoch + seen / run.lengths.batches_per_epoch
        self.control = handler.on_step_end(args, self.state, self.control)
        if self._preempted():
            self.control.should_save = self.control.should_training_stop = True
        self._look_up(run, epoch)

    def _updates(self) -> int:
        """Count the updates that were made; this waits for the device."""
        assert self._engine is not None
        return int(self._engine.state.updates)

    def _show_nonfinite(self, error: NonFiniteError) -> None:
        """Record that the loss was not a number, before the training stops for it."""
        self.log({"loss": float("nan"), "grad_norm": float("nan"), "learning_rate": self._get_learning_rate()})
        error.add_note(
            "transformers.Trainer would have gone on with weights that are nan. To go on here, leaving such steps out, "
            'give on_nonfinite="skip"; logging_nan_inf_filter=False then logs them as nan.'
        )

    def _finish(self, run: Running) -> TrainOutput:
        """Log how it went, load the best model where that was asked for, and tell callbacks."""
        steps = self.state.global_step - run.first_step
        train_loss = run.losses.total() / max(steps, 0.001)
        share = steps / max(self.state.max_steps, 1)
        metrics = speed_metrics("train", run.start, num_samples=run.lengths.samples * share, num_steps=steps)
        self.store_flos()
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = train_loss
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._keep_only_best()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, train_loss, metrics)

    def _close_engine(self) -> None:
        """Give the model memory of its own again."""
        if self._engine is not None:
            self._engine = None
            unbind(self.model)
            for p in self.model.parameters():
                p.grad = None
