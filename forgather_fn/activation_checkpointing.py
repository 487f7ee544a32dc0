"""Activation checkpointing: blocks of a model that are run again in the backward pass, instead of keeping all of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forgather_fn.flat import listed

M = TypeVar("M", bound=nn.Module)


def activation_checkpointed(module: M, *blocks: str | type[nn.Module]) -> M:
    """Let blocks of a model keep their inputs only, and run them once more when their gradient is needed.

    The results are the same to the bit: random numbers are drawn again as they were, and buffers that a block writes
    to (running statistics) are written once. It takes about a third more time, and saves the memory of what lies
    between a block's input and its output. Names of parameters stay as they are. What a block does besides (prints,
    counters that are plain numbers) it does twice.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; by ``torch.utils.checkpoint``.

    Args:
        module: Changed in place, and returned, for the use in a factory.
        blocks: Patterns of qualified names (``"layers.*"``, in which ``*`` stands for anything) and classes of modules.
            A block inside another that is chosen belongs to it.

    Raises:
        ValueError: One of them chooses no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
        >>> model = activation_checkpointed(model, nn.Sequential)
        Traceback (most recent call last):
        ...
        ValueError: activation_checkpointed: the block is the whole model, of which nothing would be saved
        >>> model = activation_checkpointed(model, "1")
        >>> model(torch.ones(1, 2)).sum().backward()
    """
    for block in blocks_of(module, blocks, "activation_checkpointed", "nothing would be saved"):
        if not isinstance(vars(block).get("forward"), _Recomputed):
            block.forward = _Recomputed(block, block.forward)
    return module


def blocks_of(
    module: nn.Module, blocks: Sequence[str | type[nn.Module]], what: str, of_the_whole: str
) -> list[nn.Module]:
    """Choose modules by patterns of their names and by their classes, the outermost of those that lie in each other.

    Args:
        module: The model.
        blocks: What chooses them.
        what: Who asks, for messages.
        of_the_whole: What would be wrong with the whole model as a block.

    Raises:
        ValueError: One of them chooses no module, or the whole model.
    """
    named = dict(module.named_modules())
    chosen: list[str] = []
    for block in blocks:
        own = [name for name, child in named.items() if _matches(block, name, child)]
        if not own:
            raise ValueError(
                f"{what}: {block!r} chooses no module; there are {listed([name for name in named if name])}"
            )
        chosen += own
    if "" in chosen:
        raise ValueError(f"{what}: the block is the whole model, of which {of_the_whole}")
    outermost = [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]
    return [named[name] for name in dict.fromkeys(outermost)]


def _matches(block: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, block) and bool(name) if isinstance(block, str) else isinstance(module, block)


@attrs.frozen(eq=False)
class _Recomputed:
    """The forward of a block. An object and not a closure, so that a copy of the module has one of its own."""

    module: nn.Module
    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        options: dict[str, Any] = {}
        if any(True for _ in self.module.buffers()):
            before = _copied(self.module)
            options["context_fn"] = lambda: (contextlib.nullcontext(), _standing_on(before))
        return checkpoint(self.__wrapped__, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)


_Buffers = list[tuple[dict[str, Tensor | None], str, Tensor | None]]


def _held(module: nn.Module) -> _Buffers:
    return [(child._buffers, name, tensor) for child in module.modules() for name, tensor in child._buffers.items()]


def _copied(module: nn.Module) -> _Buffers:
    copies: dict[int, Tensor] = {}
    return [
        (held, name, None if tensor is None else copies.setdefault(id(tensor), tensor.clone()))
        for held, name, tensor in _held(module)
    ]


@contextlib.contextmanager
def _standing_on(before: _Buffers) -> Iterator[None]:
    """Give a block the buffers that it had; what it writes to them is thrown away."""
    after = [(held, name, held[name]) for held, name, _ in before]
    for held, name, tensor in before:
        held[name] = tensor
    try:
        yield
    finally:
        for held, name, tensor in after:
            held[name] = tensor
