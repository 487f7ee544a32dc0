"""What arguments ask of a model: how it is built, and what it is while it is trained or evaluated."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from forgather.ml.trainer.nested import mapped
from forgather_fn.meta import initialise_from_meta, on_meta
from forgather_fn.neftune import noisy_embeddings

if TYPE_CHECKING:
    from forgather.ml.trainer.arguments import TrainingArguments


def constructed(model_init: Callable[[], nn.Module], args: "TrainingArguments") -> nn.Module:
    """Build a model with the data type and on the device that arguments name.

    A model that is built on the meta device gets memory on the trainer's device, and initial values under
    ``args.seed``, each module under a key of its name.

    Args:
        model_init: Builds it.
        args: ``default_dtype``, ``construct_model_on``, ``seed`` and ``device`` are read.

    Raises:
        ValueError: A tensor of a model on the meta device has no initialisation of its own; it is named.
    """
    model = built(model_init, args)
    if isinstance(model, nn.Module) and on_meta(model):
        initialise_from_meta(model, args.seed, args.device)
    return model


def built(model_init: Callable[[], nn.Module], args: "TrainingArguments") -> nn.Module:
    """Build a model as :func:`constructed` does; one on the meta device stays there, and has no values."""
    with contextlib.ExitStack() as stack:
        if args.default_dtype is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, args.default_dtype))
        if args.construct_model_on != "default":
            stack.enter_context(torch.device("meta" if args.construct_model_on == "meta" else args.device))
        return model_init()


def align_special_tokens(model: nn.Module, processing_class: Any) -> None:
    """Let a model's padding, beginning and end be those of its tokenizer, as transformers does before it trains.

    Its own function does it, and warns of what it changes.

    Args:
        model: Whose config, and that of its generation, are changed.
        processing_class: A tokenizer of transformers, or a processor that has one; anything else changes nothing.
    """
    bases = {(kind.__module__, kind.__name__) for kind in type(processing_class).__mro__}
    if bases.isdisjoint(_KNOW_TOKENS) or not hasattr(getattr(model, "config", None), "get_text_config"):
        return
    from transformers import trainer_utils  # whose class the tokenizer is of

    trainer_utils.align_special_tokens(model, processing_class)  # type: ignore[no-untyped-call]


_KNOW_TOKENS: Final = (
    ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
    ("transformers.processing_utils", "ProcessorMixin"),
)


@contextlib.contextmanager
def model_settings(model: nn.Module, args: "TrainingArguments") -> Iterator[None]:
    """Let a model be what arguments ask for, for the time of a block; then it is as it was.

    Noise on its embeddings (``neftune_noise_alpha``); compilation of its forward and backward (``torch_compile`` and
    what belongs to it), which happens at its first call; and the precision of :func:`mixed_precision`.

    Args:
        model: Changed in place, so that whoever holds it sees the same object.
        args: What is asked for.
    """
    with contextlib.ExitStack() as stack:
        if args.neftune_noise_alpha is not None:
            stack.enter_context(noisy_embeddings(model, alpha=args.neftune_noise_alpha))
        if args.torch_compile:
            stack.enter_context(_compiled(model, args))
        stack.enter_context(mixed_precision(model, args))
        yield


@contextlib.contextmanager
def mixed_precision(model: nn.Module, args: "TrainingArguments") -> Iterator[None]:
    """Let a model run under autocast, where a half precision is asked for, and give outputs in float32.

    As with Accelerate, autocast is around the model alone: losses of users' own, and metrics, compute with float32.

    Args:
        model: What is called changes, and nothing else of it: copies of it are as it was.
        args: ``bf16``, ``fp16`` and ``device`` are read.
    """
    dtype = half_precision(args)
    if dtype is None:
        yield
        return
    before = model._compiled_call_impl
    call: Callable[..., Any] = model._call_impl if before is None else before

    def lowered(*given: Any, **named: Any) -> Any:
        with torch.autocast(args.device.type, dtype):
            outputs = call(*given, **named)
        return in_float32(outputs)

    model._compiled_call_impl = lowered
    try:
        yield
    finally:
        model._compiled_call_impl = before


def half_precision(args: "TrainingArguments") -> torch.dtype | None:
    """Give the type that autocast lowers to, if any."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def in_float32(outputs: Any) -> Any:
    """Widen the tensors of nested outputs that are in half precision."""
    half = (torch.bfloat16, torch.float16)
    return mapped(lambda item: item.float() if isinstance(item, Tensor) and item.dtype in half else item, outputs)


@contextlib.contextmanager
def _compiled(model: nn.Module, args: "TrainingArguments") -> Iterator[None]:
    from torch._functorch import config

    before, budget = model._compiled_call_impl, args.activation_memory_budget
    model.compile(
        backend=args.torch_compile_backend,
        mode=args.torch_compile_mode,
        dynamic=args.torch_compile_dynamic,
        fullgraph=args.torch_compile_full_graph,
    )
    try:
        with contextlib.nullcontext() if budget is None else config.patch(activation_memory_budget=budget):
            yield
    finally:
        model._compiled_call_impl = before
