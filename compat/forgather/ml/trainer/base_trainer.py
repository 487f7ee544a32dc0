"""The work that all trainers share."""

import abc
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

import forgather_fn as ff
from forgather.ml.trainer.abstract import AbstractBaseTrainer as AbstractBaseTrainer
from forgather.ml.trainer.abstract import ExtensibleTrainer as ExtensibleTrainer
from forgather.ml.trainer.callbacks import PrinterCallback, ProgressCallback
from forgather.ml.trainer.card import CardMixin
from forgather.ml.trainer.checking import CheckingMixin, optimizer_pair, several
from forgather.ml.trainer.collators import default_collator
from forgather.ml.trainer.lacking import LackingMixin
from forgather.ml.trainer.loop import LoopMixin
from forgather.ml.trainer.messages import show_messages
from forgather.ml.trainer.model_settings import constructed
from forgather.ml.trainer.reporting import reporters
from forgather.ml.trainer.seeding import enable_full_determinism, set_seed
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState
from forgather_fn.program import Program
from forgather_fn.world import ALONE, World


class BaseTrainer(CheckingMixin, CardMixin, LoopMixin, ExtensibleTrainer, LackingMixin):
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
    is_fsdp_xla_enabled = is_fsdp_xla_v1_enabled = is_fsdp_xla_v2_enabled = False
    is_distributed_loading_by_transformers = False
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
        self.distributed_env = distributed_env
        self._world, self._accumulate = self._join(), None
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
        self.optimizer, self.lr_scheduler = optimizer_pair(optimizers)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.optimizer_factory, self.lr_scheduler_factory = optimizer_factory, lr_scheduler_factory
        self._introspect_model()
        self.label_smoother = self._smoother()
        self._begin()
        self._check_construction()
        ExtensibleTrainer.__init__(self, [*reporters(self.args.report_to), *several(callbacks)])
        self.callback_handler.add_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        for name in ("model", "processing_class", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._begin_books()
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        if getattr(self.model, "config", None) is not None:
            self.model.config.use_cache = self.args.use_cache  # type: ignore[union-attr]

    @abc.abstractmethod
    def _strategy(self, plan: ff.Plan) -> Program:
        """Make the program of a plan: all that concrete trainers differ in."""

    def _join(self) -> World:
        """Find the processes that share the microbatches of a step; none by default."""
        return ALONE

    def _begin(self) -> None:
        """Set what nobody gives."""
        self._halved = self._in_parts = self._called = False
        self.is_in_train = self._prepared = self._created_lr_scheduler = self._watched = False
        self.hub_model_id = self._engine = self._writing = self._run = None
        self.current_flos, self._flops = 0, 0.0
        self.neftune_noise_alpha = self.args.neftune_noise_alpha
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._share, self._is_last, self._uses_items = 1.0, True, None
        self._initial_num_input_tokens_seen = 0
        self._train_batch_size = self.args.train_batch_size

    def _begin_books(self) -> None:
        """Make what callbacks read, the output directory, and the level of the loggers."""
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
        if self.args.log_level != "passive":
            show_messages(self.args.get_process_log_level())
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=self._exportable(),  # type: ignore[arg-type]
        )

    def _given_model(self, model: nn.Module | None) -> nn.Module:
        if model is None and self.model_init is None:
            raise RuntimeError("`Trainer` requires either a `model` or `model_init` argument")
        if model is not None and self.model_init is not None:
            raise ValueError("`Trainer` requires either a `model` or `model_init` argument, but not both.")
        given = self.call_model_init() if model is None else model
        if not isinstance(given, nn.Module):
            raise ValueError(
                f"Trainer: expected a torch.nn.Module as its model, got {given!r}; a name is loaded by you: "
                "AutoModelForCausalLM.from_pretrained(name)"
            )
        return given

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
        model = self._constructed(functools.partial(build, trial) if number else build)
        if model is None:
            raise RuntimeError("model_init should not return None.")
        return model

    def _constructed(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build a model with the data type, on the device, and with the values that arguments name."""
        return constructed(build, self.args)

    def _place_model(self) -> None:
        wanted = self.args.place_model_on_device
        full = self.args.fp16_full_eval or self.args.bf16_full_eval
        self.place_model_on_device = (not full) if wanted is None else bool(wanted)
        if getattr(self.model, "hf_device_map", None) is not None:
            self.place_model_on_device = False
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move a model, but one that lies on several devices already; override it to move yours otherwise, or not."""
        if getattr(model, "hf_device_map", None) is None:
            model.to(device)

    def _rebuild_model(self) -> None:
        """Build the model anew, where it is built by a function, with optimizer and schedule; place it."""
        if self.model_init is not None:
            (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
            self.model = self.model_wrapped = self.call_model_init()
            self.optimizer = self.lr_scheduler = None
            self._introspect_model()
        if self.place_model_on_device or self.model_init is None:
            self._move_model_to_device(self.model, self.args.device)
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

    @functools.cached_property
    def accelerator(self) -> Any:
        """Accelerate's object, made when it is first asked for: the trainer itself does not need it."""
        from accelerate import Accelerator

        made = Accelerator(cpu=self.args.device.type == "cpu")
        made.scaler = self._scaler if self.args.fp16 else None
        made.gradient_state._set_sync_gradients(self._is_last)
        return made

    @functools.cached_property
    def gather_function(self) -> Any:
        """Accelerate's ``gather_for_metrics``, for overrides; what an evaluation keeps is gathered when it ends."""
        gather = self.accelerator.gather_for_metrics
        return functools.partial(gather, use_gather_object=self.args.eval_use_gather_object)

    @property
    def tokenizer(self) -> Any:
        """The older name of ``processing_class``."""
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.processing_class = tokenizer

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

    def end(self) -> None:
        """End the trackers and the process group, where Accelerate began them."""
        held = self.__dict__.get("accelerator")
        if held is not None:
            held.end_training()


def _one(name: str, given: Any, other: str, alias: Any) -> Any:
    """Take an argument under either of its names.

    Raises:
        ValueError: Both are given.
    """
    if given is not None and alias is not None:
        raise ValueError(f"{other}= is another name of {name}=: give one of them")
    return given if alias is None else alias
