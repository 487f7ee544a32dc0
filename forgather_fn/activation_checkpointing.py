"""Activation checkpointing: blocks of a model that are run again in the backward pass, instead of keeping all of it."""

import contextlib
from collections.abc import Callable, Iterator
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
    named = dict(module.named_modules())
    chosen: list[str] = []
    for block in blocks:
        own = [name for name, child in named.items() if _matches(block, name, child)]
        if not own:
            raise ValueError(
                f"activation_checkpointed: {block!r} chooses no module; there are "
                f"{listed([name for name in named if name])}"
            )
        chosen += own
    if "" in chosen:
        raise ValueError("activation_checkpointed: the block is the whole model, of which nothing would be saved")
    for name in chosen:
        if not any(name.startswith(f"{other}.") for other in chosen) and not _is_recomputed(named[name]):
            named[name].forward = _Recomputed(named[name], named[name].forward)
    return module


def _matches(block: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, block) and bool(name) if isinstance(block, str) else isinstance(module, block)


def _is_recomputed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _Recomputed)


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
