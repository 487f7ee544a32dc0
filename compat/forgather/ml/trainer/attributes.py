"""What a trainer holds: the attributes that the parts of :class:`~forgather.ml.trainer.base_trainer.BaseTrainer` share.

They are public because users of transformers read and set them; a leading underscore marks those that only this package
reads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from forgather.ml.trainer.callbacks.dispatch import CallbackHandler
from forgather_fn.share import Share
from forgather_fn.world import World


class Attributes:
    """Declarations only.

    Attributes:
        args: As given, never changed; read at each call.
        model: The live module: during training its parameters are the state's memory.
        model_wrapped: The same module.
        optimizer: A torch optimizer over the module's parameters; None before the first training.
        lr_scheduler: A torch scheduler over it.
        state: What callbacks read of the progress.
        control: What callbacks ask for.
        is_in_train: Whether ``train()`` runs.
        current_gradient_accumulation_steps: Microbatches of the running step.
        loss_is_scaled_for_ga: Set by subclasses whose ``compute_loss`` divides by the number of items of the whole step
            (True), or by that of its microbatch (False); None finds out.
    """

    args: Any
    model: nn.Module
    model_wrapped: nn.Module
    model_init: Callable[..., nn.Module] | None
    data_collator: Callable[[list[Any]], Any]
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Mapping[str, Any]] | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    optimizer_factory: Callable[..., Any] | None
    lr_scheduler_factory: Callable[..., Any] | None
    callback_handler: CallbackHandler
    state: Any
    control: Any
    label_names: list[str]
    label_smoother: Callable[..., torch.Tensor] | None
    can_return_loss: bool
    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga: bool | None = None
    place_model_on_device: bool
    is_in_train: bool
    current_gradient_accumulation_steps: int
    _world: World
    _accumulate: int | None
    hub_model_id: str | None
    current_flos: float
    _train_batch_size: int
    _signature_columns: list[str] | None

    @property
    def _own_accumulation(self) -> int:
        """Microbatches of a step on one process: as arguments say, or as a run that goes on was trained with."""
        return int(self.args.gradient_accumulation_steps if self._accumulate is None else self._accumulate)

    @property
    def _microbatches(self) -> int:
        """Microbatches of a step, over all processes."""
        return self._own_accumulation * self._world.size

    @property
    def _peers(self) -> World:
        """The processes that must do the same: those that share out the data, and others that see all of it."""
        return self._world

    @property
    def _own_share(self) -> Share:
        """Which microbatches of a step this process has."""
        return Share(self._microbatches, self._world.rank, self._world.size)
