"""The hierarchy of trainers: what every trainer can do, callbacks, and the work that all share."""

import abc
import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from torch import nn

import forgather_fn as ff
from forgather.ml.trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
)
from forgather.ml.trainer.collators import default_collator
from forgather.ml.trainer.loop import LoopPart
from forgather.ml.trainer.model_settings import constructed
from forgather.ml.trainer.objective import smoother
from forgather.ml.trainer.reporting import reporters
from forgather.ml.trainer.seeding import enable_full_determinism, set_seed
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState
from forgather_fn.plan import Program


class AbstractBaseTrainer(abc.ABC):
    """What every trainer can do."""

    @abc.abstractmethod
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model."""

    @abc.abstractmethod
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model."""

    @abc.abstractmethod
    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model to a directory."""


class ExtensibleTrainer(AbstractBaseTrainer):
    """A trainer with callbacks.

    Attributes:
        callback_handler: Holds them, in order, and calls them.
    """

    callback_handler: CallbackHandler

    def __init__(self, callbacks: Any = ()) -> None:
        self.callback_handler = CallbackHandler([DefaultFlowCallback, *(callbacks or ())])

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or an instance of a callback class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and give it; None if there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class."""
        self.callback_handler.remove_callback(callback)


class BaseTrainer(LoopPart, ExtensibleTrainer):
    """The work that all trainers share: everything but the strategy by which a plan becomes a program.

    A drop-in for ``transformers.Trainer``. Positional arguments are in its order; those of Forgather's trainers are
    keywords.

    Args:
        model: A model of transformers, or any ``torch.nn.Module``.
        args: Arguments; a dict of them; transformers' own object; or None for the defaults.
        data_collator: Makes a batch of samples.
        train_dataset: Map-style or iterable.
        eval_dataset: One, or a dict of several.
        processing_class: A tokenizer or another processor, saved beside the model.
        model_init: Builds a model; called at once and again by each ``train()``. Instead of ``model``.
        compute_loss_func: ``(outputs, labels, num_items_in_batch=...) -> loss``, or ``(logits, labels) -> loss``.
        compute_metrics: ``EvalPrediction -> dict``.
        callbacks: Classes or instances, after the built-in ones.
        optimizers: A torch optimizer over the model's parameters and a scheduler; either may be None.
        optimizer_cls_and_kwargs: A class of optimizers and its options, but for the parameters.
        preprocess_logits_for_metrics: ``(logits, labels) -> what is kept``, batch by batch.
        optimizer_factory: ``named parameters -> optimizer``.
        lr_scheduler_factory: ``optimizer -> scheduler``.
        loss_fn: Another name of ``compute_loss_func``.
        tokenizer: Another name of ``processing_class``, as version 4 had it.
        distributed_env: The processes that run the job; only looked at.

    Raises:
        ValueError: Arguments contradict each other.
        RuntimeError: Neither a model nor ``model_init`` is given, or two sources of an optimizer are.
    """

    _arguments_class: Any = None
    is_model_parallel = is_deepspeed_enabled = is_fsdp_enabled = False
    deepspeed = hp_name = hp_search_backend = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        *,
        optimizer_factory: Callable[..., Any] | None = None,
        lr_scheduler_factory: Callable[..., Any] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        tokenizer: Any = None,
        distributed_env: Any = None,
    ) -> None:
        from forgather.ml.trainer.arguments import TrainingArguments, arguments_from

        self.args = arguments_from(args, self._arguments_class or TrainingArguments)
        self._given_args = args
        self._seen_args = dict(vars(args)) if is_dataclass(args) else {}
        if self.args.log_level != "passive":
            for name in ("forgather", "forgather_fn"):
                logging.getLogger(name).setLevel(self.args.get_process_log_level())
        self.distributed_env = distributed_env
        (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
        self.model_init = model_init
        self.processing_class = _one("processing_class", processing_class, "tokenizer", tokenizer)
        self.compute_loss_func = _one("compute_loss_func", compute_loss_func, "loss_fn", loss_fn)
        self.model = self.model_wrapped = self._given_model(model)
        self._place_model()
        self.data_collator = data_collator if data_collator is not None else default_collator(self.processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.optimizer_factory, self.lr_scheduler_factory = optimizer_factory, lr_scheduler_factory
        self._introspect_model()
        self.label_smoother = self._smoother()
        self._begin()
        self._check_construction()
        ExtensibleTrainer.__init__(self, [*reporters(self.args.report_to), *(callbacks or ())])
        self.callback_handler.add_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        for name in ("model", "processing_class", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=self._exportable(),  # type: ignore[arg-type]
        )
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        if getattr(self.model, "config", None) is not None:
            self.model.config.use_cache = self.args.use_cache  # type: ignore[union-attr]

    @abc.abstractmethod
    def _strategy(self, plan: ff.Plan) -> Program:
        """Make the program of a plan: all that concrete trainers differ in."""

    def _begin(self) -> None:
        """Set what nobody gives."""
        self.is_in_train = self._prepared = self._created_lr_scheduler = self._watched = False
        self.hub_model_id = self._engine = self._writing = self._run = None
        self.current_flos, self._flops = 0, 0.0
        self.neftune_noise_alpha = self.args.neftune_noise_alpha
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._share, self._uses_items = 1.0, None
        self._initial_num_input_tokens_seen = 0
        self._train_batch_size = self.args.train_batch_size

    def _given_model(self, model: nn.Module | None) -> nn.Module:
        if model is None and self.model_init is None:
            raise RuntimeError("`Trainer` requires either a `model` or `model_init` argument")
        if model is not None and self.model_init is not None:
            raise ValueError("`Trainer` requires either a `model` or `model_init` argument, but not both.")
        return self.call_model_init() if model is None else model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build a model by ``model_init``.

        Raises:
            RuntimeError: It takes more than one argument, or returns None.
        """
        assert self.model_init is not None
        build = self.model_init
        parameters = list(inspect.signature(build).parameters.values())
        if isinstance(build, functools.partial):  # what it was not given, and needs
            parameters = [one for one in parameters if one.default is one.empty]
        number = len(parameters)
        if number > 1:
            raise RuntimeError("model_init should have 0 or 1 argument.")
        model = constructed(functools.partial(build, trial) if number else build, self.args)
        if model is None:
            raise RuntimeError("model_init should not return None.")
        return model

    def _place_model(self) -> None:
        wanted = self.args.place_model_on_device
        full = self.args.fp16_full_eval or self.args.bf16_full_eval
        self.place_model_on_device = (not full) if wanted is None else bool(wanted)
        if getattr(self.model, "hf_device_map", None) is not None:
            self.place_model_on_device = False
        if self.place_model_on_device:
            self.model.to(self.args.device)

    def _rebuild_model(self) -> None:
        """Build the model anew, where it is built by a function, with optimizer and schedule; place it."""
        if self.model_init is not None:
            (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
            self.model = self.model_wrapped = self.call_model_init()
            self.optimizer = self.lr_scheduler = None
            self._introspect_model()
        if self.place_model_on_device or self.model_init is None:
            self.model.to(self.args.device)
        if self.args.activation_checkpointing:
            self._checkpoint_activations()

    def _checkpoint_activations(self) -> None:
        options = dict(self.args.activation_checkpointing_kwargs or {})
        model: Any = self.model
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            enable = getattr(model, name, None)
            if enable is not None:
                own = f"{name.removesuffix('_enable')}_kwargs"
                enable(**{own: options or None})
                return
        raise ValueError(
            f"activation_checkpointing=True, but {type(model).__name__} has no gradient_checkpointing_enable(). Give "
            "it one, or choose the blocks yourself: "
            "forgather_fn.activation_checkpointing.activation_checkpointed(model, 'layers.*')"
        )

    def _smoother(self) -> Any:
        if not self.args.label_smoothing_factor:
            return None
        kind = getattr(getattr(self.model, "config", None), "problem_type", None)
        if kind == "multi_label_classification":
            raise ValueError("label_smoothing_factor is not defined for problem_type='multi_label_classification'")
        return smoother(self.args.label_smoothing_factor)

    def _check_overrides(self) -> None:
        """Refuse a subclass that overrides what is never called here: it would be ignored.

        Raises:
            ValueError: It does; what to override instead is named.
        """
        for name, instead in NEVER_CALLED.items():
            if hasattr(type(self), name):
                raise ValueError(
                    f"{type(self).__name__} overrides {name}, a private method of transformers that this trainer does "
                    f"not call: {instead}"
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
        self._check_data()

    def _check_data(self) -> None:
        from forgather.ml.trainer.data import has_length

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
        from forgather.ml.trainer.refusals import refuse_unhonoured

        if is_dataclass(self._given_args) and self._given_args is not self.args:
            # Transformers' own object, of which a copy is used: what was changed in it since then counts.
            now = dict(vars(self._given_args))
            for name, value in now.items():
                if name not in self._seen_args or self._seen_args[name] is not value:
                    setattr(self.args, name, value)
            self._seen_args = now
        refuse_unhonoured(self.args)

    @functools.cached_property
    def accelerator(self) -> Any:
        """Accelerate's object, made when it is first asked for: the trainer itself does not need it."""
        from accelerate import Accelerator

        return Accelerator(cpu=self.args.device.type == "cpu")

    @property
    def tokenizer(self) -> Any:
        """The older name of ``processing_class``."""
        return self.processing_class

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, and show the loop to write instead."""
        raise ValueError(
            "hyperparameter_search is not supported. A search is a loop over trainers:\n"
            "    for learning_rate in (1e-5, 3e-5, 1e-4):\n"
            "        args = dataclasses.replace(trainer.args, learning_rate=learning_rate, output_dir=...)\n"
            "        found = Trainer(model_init=model_init, args=args, ...)\n"
            "        found.train()\n"
            "        results[learning_rate] = found.evaluate()\n"
            "or the objective function of a study of Optuna that returns found.evaluate()['eval_loss']."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, and show what to write instead."""
        raise ValueError("push_to_hub is not supported: trainer.save_model(), then trainer.model.push_to_hub(name)")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, and show what to write instead."""
        raise ValueError("create_model_card is not supported: write README.md beside what save_model() wrote")

    def end(self) -> None:
        """End the trackers and the process group, where Accelerate began them."""
        held = self.__dict__.get("accelerator")
        if held is not None:
            held.end_training()


_EVENTS_OR_STEP = "override training_step, compute_loss or log, or write a callback"
NEVER_CALLED = {
    "_inner_training_loop": _EVENTS_OR_STEP,
    "_run_epoch": _EVENTS_OR_STEP,
    "_init_training_state": "override train(), or write a callback with on_train_begin",
    "_finalize_training": "write a callback with on_train_end",
    "_clip_grad_norm": "write a callback with on_pre_optimizer_step, and set max_grad_norm=0",
    "_get_grad_norm": "write a callback with on_pre_optimizer_step",
    "_wrap_model": "wrap the model before it is given to the trainer",
    "_validate_args": "override __init__",
    "_load_callback_state": "give the callback state() and from_state()",
    "_load_scaler": "float16 is not supported yet",
    "_save_scaler": "float16 is not supported yet",
    "create_accelerator_and_postprocess": "set trainer.accelerator after the trainer is made",
    "_build_accelerator_args": "set trainer.accelerator after the trainer is made",
    "_nested_gather": "there is one process: what is to be gathered is there",
    "_pad_across_processes": "there is one process: nothing is padded for others",
}
"""Private methods of transformers' Trainer that are not called here, and what to override instead."""


def _one(name: str, given: Any, other: str, alias: Any) -> Any:
    """Take an argument under either of its names.

    Raises:
        ValueError: Both are given.
    """
    if given is not None and alias is not None:
        raise ValueError(f"{other}= is another name of {name}=: give one of them")
    return given if alias is None else alias
