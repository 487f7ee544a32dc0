"""When to log, evaluate, save and stop, by the arguments."""

from typing import Any

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.enums import IntervalStrategy, SaveStrategy
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class DefaultFlowCallback(TrainerCallback):
    """Ask for logs, evaluations and saves at the intervals of the arguments, and for the end after ``max_steps``.

    It comes first, so that callbacks after it can ask otherwise.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for what is due after this step; the last one also evaluates and saves where the strategy is steps."""
        step, last = state.global_step, state.global_step >= state.max_steps
        if step == 1 and args.logging_first_step:
            control.should_log = True
        if args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0:
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= step:
            control.should_evaluate |= last or step % state.eval_steps == 0
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save |= last or (state.save_steps > 0 and step % state.save_steps == 0)
        control.should_training_stop |= last
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for what is due after this epoch."""
        control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
        control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        return control
