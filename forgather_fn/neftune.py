"""Noise on embeddings while a model is trained."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def noisy_embeddings(module: nn.Module, *, alpha: float) -> Iterator[None]:
    """Add uniform noise to what an embedding gives, in training mode, for the time of a block.

    The noise of an element lies within ``alpha / sqrt(time * width)``. It is drawn from torch's generator, as dropout
    is, so that in a step it depends on the step's key alone.

    Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914.

    Args:
        module: An embedding, or a model with ``get_input_embeddings()``, as those of Hugging Face and PEFT have. What
            it gives has the shape ``[batch, time, width]``.
        alpha: The size of the noise; 5 to 15 in the paper.

    Raises:
        ValueError: ``alpha`` is negative, or the module is neither.

    Example:
        >>> embedding = nn.Embedding(4, 2)
        >>> with noisy_embeddings(embedding, alpha=5.0):
        ...     noisy = embedding(torch.tensor([[1, 2]]))
        >>> torch.equal(noisy, embedding(torch.tensor([[1, 2]])))
        False
    """
    if not alpha >= 0:
        raise ValueError(f"noisy_embeddings: alpha={alpha!r}: expected a number of at least 0")
    embedding = _embedding(module)

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        bound = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.zeros_like(output).uniform_(-bound, bound)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _embedding(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module
    get = getattr(module, "get_input_embeddings", None)
    found = get() if callable(get) else None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"noisy_embeddings: {type(module).__name__} is no embedding and has no get_input_embeddings(); pass the "
            "embedding itself, such as model.embed"
        )
    return found
