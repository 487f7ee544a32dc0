"""Attributes of transformers' Trainer that are not here: an error says what is instead."""

from typing import TYPE_CHECKING, Any, Final

from forgather.ml.trainer.checking import NEVER_CALLED

_LOSSES = "losses are the running loop's: read them in state.log_history, or override log()"
_RUN = "it is the running loop's: read state.global_step, or write a callback with on_train_begin"

LACKING: Final = {
    "_memory_tracker": "no memory is measured here: leave its start() and stop_and_update_metrics() out, or add the "
    "callback PeakMemory",
    "_tr_loss": _LOSSES,
    "_total_loss_scalar": _LOSSES,
    "_globalstep_last_logged": _RUN,
    "_initial_global_step": _RUN,
    "_loggers_initialized": _RUN,
    "_trial": "hyperparameter_search is refused: write a loop over trainers",
    "_mixed_mesh_grads": "models are not sharded here: see ff.accelerated(plan, sharded=True)",
    "neftune_hook_handle": "the noise is taken off the model again when train() ends",
}
"""Attributes of a transformers' Trainer that this one has not, and what to do instead."""


class LackingMixin:
    """The part of a trainer that says what is instead of what it has not."""

    if not TYPE_CHECKING:  # for a type checker, what is not there stays an error

        def __getattr__(self, name: str) -> Any:
            """Refuse an attribute that is not there.

            Raises:
                AttributeError: Always; where transformers has it, what to do instead is named.
            """
            instead = LACKING.get(name) or NEVER_CALLED.get(name)
            if instead is None:
                return super().__getattribute__(name)  # raises, and what a property itself raised
            raise AttributeError(
                f"{type(self).__name__} has no {name}, which transformers' Trainer has: {instead}", name=name, obj=self
            )
