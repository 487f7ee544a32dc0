"""What arguments ask of a model: how it is built, and what it is while it is trained or evaluated."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

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


@contextlib.contextmanager
def model_settings(model: nn.Module, args: "TrainingArguments") -> Iterator[None]:
    """Let a model be what arguments ask for, for the time of a block; then it is as it was.

    Noise on its embeddings (``neftune_noise_alpha``), and compilation of its forward and backward (``torch_compile``
    and what belongs to it), which happens at its first call.

    Args:
        model: Changed in place, so that whoever holds it sees the same object.
        args: What is asked for.
    """
    with contextlib.ExitStack() as stack:
        if args.neftune_noise_alpha is not None:
            stack.enter_context(noisy_embeddings(model, alpha=args.neftune_noise_alpha))
        if args.torch_compile:
            stack.enter_context(_compiled(model, args))
        yield


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
