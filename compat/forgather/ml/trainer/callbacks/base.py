"""What callbacks derive from."""

from collections.abc import Mapping
from typing import Any

from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)
"""The events, as transformers 5.23 has them."""

Answer = TrainerControl | None
Logs = Mapping[str, Any] | None
"""What is logged, or measured, by name."""


class TrainerCallback:
    """Something that looks at a run, at its events, and may ask for something.

    An event is called as ``on_x(args, state, control, **kwargs)``, where ``kwargs`` has ``model, processing_class,
    optimizer, lr_scheduler, train_dataloader, eval_dataloader``, and ``logs`` or ``metrics`` where there are some.
    Write the ones that you need into the signature, and ``**kwargs`` for the rest. Set flags of ``control`` and return
    it, or return None.

    Order of a step: ``on_step_begin``, ``on_substep_end`` after each accumulated batch but the last,
    ``on_pre_optimizer_step`` (the gradient is clipped), ``on_optimizer_step``, ``on_step_end`` (``global_step`` counts
    this step already), then, as asked for, ``on_log``, ``on_prediction_step``, ``on_evaluate``, ``on_save``.

    Example:
        >>> class StopAt(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 100
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a trainer that is made."""
        return None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a run before its first step."""
        return None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a run after its last step; the best model is loaded, if that was asked for."""
        return None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at an epoch before its first step."""
        return None

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at an epoch after its last step."""
        return None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a step before its first batch."""
        return None

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at the clipped gradient, before the update."""
        return None

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at the updated parameters, while the gradient is there."""
        return None

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a step that is not its last accumulated batch."""
        return None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a step that is done, and ask for what is to follow it."""
        return None

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at the ``metrics`` of an evaluation."""
        return None

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> Answer:
        """Look at the ``metrics`` of a prediction."""
        return None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a checkpoint that is on disk."""
        return None

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at the ``logs``: a dict without the step, which is ``state.global_step``."""
        return None

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at an evaluation between two batches."""
        return None

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Look at a push to the Hub before it begins; trainers here never push."""
        return None
