"""What does not fit together is refused when a trainer is made, or trains."""

import inspect
import logging
import warnings
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.data import has_length
from forgather.ml.trainer.microbatches import smoother
from forgather.ml.trainer.refusals import refuse_unhonoured
from forgather_fn.data import Stream
from forgather_fn.signature import shown

_EVENTS_OR_STEP = "override training_step, compute_loss or log, or write a callback"
_SHARDED = "models are not sharded here: see ff.accelerated(plan, sharded=True)"
_PARALLEL = "parallelism_config is refused: PipelineTrainer cuts a model into stages"
_HUB = "push_to_hub is refused: push what was saved"
_SEARCH = "hyperparameter_search is refused: write a loop over trainers"
NEVER_CALLED = {
    "_inner_training_loop": _EVENTS_OR_STEP,
    "_run_epoch": _EVENTS_OR_STEP,
    "_init_training_state": "override train(), or write a callback with on_train_begin",
    "_prepare_for_training": "override create_optimizer_and_scheduler, or write a callback with on_train_begin",
    "_finalize_training": "write a callback with on_train_end",
    "_clip_grad_norm": "write a callback with on_pre_optimizer_step, and set max_grad_norm=0",
    "_get_grad_norm": "write a callback with on_pre_optimizer_step",
    "_wrap_model": "self.model has no wrapper; one of yours is put around it before the trainer is made",
    "_validate_args": "override __init__",
    "_load_callback_state": "give the callback state() and from_state()",
    "_load_scaler": "there is no scaler object: the scale of a float16 loss is part of the state",
    "_save_scaler": "there is no scaler object: the scale of a float16 loss is part of the state",
    "create_accelerator_and_postprocess": "set trainer.accelerator after the trainer is made",
    "_build_accelerator_args": "set trainer.accelerator after the trainer is made",
    "_issue_warnings_after_load": "override _load_from_checkpoint",
    "_update_auto_batch_size": "override get_train_dataloader, which is called for each batch size that is tried",
    "_prepare_context_parallel_inputs": f"override _prepare_inputs; {_PARALLEL}",
    "get_cp_size": _PARALLEL,
    "get_sp_size": _PARALLEL,
    "get_tp_size": _PARALLEL,
    "_defer_fsdp_gradient_reduction": _SHARDED,
    "_has_mixed_mesh_grads": _SHARDED,
    "_mixed_mesh_grad_norm": _SHARDED,
    "_sync_replicated_trainable_parameters": _SHARDED,
    "init_hf_repo": _HUB,
    "_push_from_checkpoint": _HUB,
    "_finish_current_push": _HUB,
    "_hp_search_setup": _SEARCH,
    "_report_to_hp_search": _SEARCH,
    "_tune_save_checkpoint": _SEARCH,
    "_nested_gather": "what an evaluation keeps is gathered when it ends: override evaluation_loop",
    "_pad_across_processes": "what an evaluation keeps is padded when it ends: override evaluation_loop",
}
"""Methods of transformers' Trainer, private but for a few, that are not called here, and what to override instead."""


def optimizer_pair(given: Any) -> tuple[Any, Any]:
    """Take ``optimizers=`` apart.

    Raises:
        ValueError: It is no pair, or its first is no optimizer of torch.
    """
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(
            f"optimizers takes a pair, (optimizer, scheduler), either of which may be None; got {shown(given)}"
        )
    optimizer, scheduler = given
    if optimizer is not None and (isinstance(optimizer, type) or not hasattr(optimizer, "param_groups")):
        raise ValueError(
            f"optimizers: expected an optimizer of torch, which was made of the model's parameters; got "
            f"{shown(optimizer)}. A class goes into optimizer_cls_and_kwargs=(torch.optim.AdamW, {{'lr': 1e-3}}), "
            "one of forgather_fn into a Plan"
        )
    return optimizer, scheduler


def several(callbacks: Any) -> list[Any]:
    """Take ``callbacks=``.

    Raises:
        ValueError: It is one callback, and no list of them.
    """
    if callbacks is not None and not isinstance(callbacks, Iterable):
        raise ValueError(f"callbacks takes a list of them: callbacks=[{shown(callbacks)}]")
    return list(callbacks or ())


logger = logging.getLogger(__name__)


class CheckingMixin(Attributes):
    """The part of a trainer that checks what it is given."""

    _given_args: Any
    _seen_args: dict[str, Any]

    def _smoother(self) -> Any:
        if not self.args.label_smoothing_factor:
            return None
        kind = getattr(getattr(self.model, "config", None), "problem_type", None)
        if kind == "multi_label_classification":
            warnings.warn(
                "Label smoothing is not compatible with multi-label classification. Disabling label smoothing for this "
                "training run.",
                UserWarning,
                stacklevel=4,  # this method < BaseTrainer.__init__ < a trainer's __init__ < the user's line
            )
            return None
        return smoother(self.args.label_smoothing_factor)

    def _check_overrides(self) -> None:
        """Refuse a subclass that overrides what is never called here: it would be ignored.

        Raises:
            ValueError: It does; what to override instead is named.
        """
        for name, instead in NEVER_CALLED.items():
            if hasattr(type(self), name):
                raise ValueError(
                    f"{type(self).__name__} overrides {name}, a method of transformers' Trainer that this one does not "
                    f"call: {instead}"
                )

    def _check_construction(self) -> None:
        """Refuse what does not fit together."""
        args = self.args
        self._check_overrides()
        metrics = self.compute_metrics
        if args.batch_eval_metrics and metrics and "compute_result" not in inspect.signature(metrics).parameters:
            raise ValueError(
                "When using `batch_eval_metrics`, your `compute_metrics` function must take a `compute_result` boolean "
                "argument which will be triggered after the last batch of the eval set to signal that the summary "
                "statistics should be returned by the function."
            )
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and self.eval_dataset is None:
            raise ValueError(
                f"You have set `args.eval_strategy` to {args.eval_strategy} but you didn't pass an `eval_dataset` to "
                "`Trainer`. Either set `args.eval_strategy` to `no` or pass an `eval_dataset`. "
            )
        best = str(getattr(args.save_strategy, "value", args.save_strategy)) == "best" or args.load_best_model_at_end
        if best and args.metric_for_best_model is None:
            raise ValueError(
                "`args.metric_for_best_model` must be provided when using 'best' save_strategy or if "
                "`args.load_best_model_at_end` is set to `True`."
            )
        if self.optimizer_cls_and_kwargs is not None and self.optimizer is not None:
            raise RuntimeError("Passing both `optimizers` and `optimizer_cls_and_kwargs` arguments is incompatible.")
        if self.model_init is not None and (self.optimizer is not None or self.lr_scheduler is not None):
            raise RuntimeError(
                "Passing a `model_init` is incompatible with providing the `optimizers` argument. "
                "You should subclass `Trainer` and override the `create_optimizer_and_scheduler` method."
            )
        self._check_optimizer()
        self._check_data()

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that was made of other parameters than the model's: it would train nothing."""
        if self.optimizer is None:
            return
        ours = set(map(id, self.model.parameters()))
        theirs = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if theirs and ours.isdisjoint(map(id, theirs)):
            raise ValueError(
                "optimizers: none of the optimizer's parameters is one of the model's, so that nothing would be "
                "trained; make it of this model: torch.optim.AdamW(model.parameters(), ...)"
            )

    def _check_data(self) -> None:

        for name in ("train_dataset", "eval_dataset"):
            given = getattr(self, name)
            if isinstance(given, DataLoader | Stream):
                raise ValueError(
                    f"{name}: a {type(given).__name__} gives batches, and a trainer makes its own; give the dataset "
                    f"itself, {name}=loader.dataset, or override get_{name.removesuffix('_dataset')}_dataloader()"
                )
        collator = self.data_collator
        if not callable(collator) and callable(getattr(collator, "collate_batch", None)):
            raise TypeError("The `data_collator` should be a simple callable (function, class with `__call__`).")
        if self.train_dataset is not None and not has_length(self.train_dataset) and self.args.max_steps <= 0:
            raise ValueError(
                "The train_dataset does not implement __len__, so the number of training steps cannot be inferred; "
                "max_steps has to be specified. The total number of steps must be known in advance to bound the "
                "training loop and to configure the learning rate scheduler."
            )

    def _check_args(self) -> None:
        """Look at the arguments once more, since they can be changed after the trainer is made."""
        if is_dataclass(self._given_args) and self._given_args is not self.args:
            # Transformers' own object, of which a copy is used: what was changed in it since then counts.
            now = dict(vars(self._given_args))
            for name, value in now.items():
                if name not in self._seen_args or self._seen_args[name] is not value:
                    setattr(self.args, name, value)
            self._seen_args = now
        refuse_unhonoured(self.args)
        self._tell_of_idle_devices()
        if self._world.size != self.args.world_size:
            raise ValueError(
                f"a launcher started {self.args.world_size} processes, and {type(self).__name__} trains on "
                f"{self._world.size}: each would train by itself, and all would write to {self.args.output_dir!r}. For "
                "several processes use AccelTrainer with AccelTrainingArguments; for this trainer, start one process: "
                "python script.py, without torchrun or accelerate launch"
            )

    def _tell_of_idle_devices(self) -> None:
        """Warn where transformers would train on several accelerators in this process, with a larger batch."""
        args, count = self.args, torch.accelerator.device_count()
        if args.n_gpu and args.world_size == 1 and count > 1:
            logger.warning(
                "of %d accelerators this process uses one, with batches of %d samples, where transformers.Trainer uses "
                "all, with batches of %d. For all of them use AccelTrainer, and forgather launch -n %d script.py; to "
                "hide the others, set CUDA_VISIBLE_DEVICES",
                *(count, args.train_batch_size, count * args.per_device_train_batch_size, count),
            )
