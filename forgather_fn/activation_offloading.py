"""Activation offloading: what blocks of a model keep for their backward pass waits in the host's memory."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from forgather_fn.activation_checkpointing import blocks_of

M = TypeVar("M", bound=nn.Module)

LEAST_BYTES: Final = 1 << 16
"""Smaller tensors stay where they are: a transfer takes longer than they are worth."""


def activation_offloaded(module: M, *blocks: str | type[nn.Module], least_bytes: int = LEAST_BYTES) -> M:
    """Let blocks of a model keep what their backward pass needs in the host's memory, and fetch it when it is needed.

    The results are the same to the bit; the memory of an accelerator is that of one block, the time that of two
    transfers, which run beside the computation (the host's memory is pinned). Parameters and buffers stay where they
    are, and so does everything of a model that runs on the host. Of blocks that are
    :func:`~forgather_fn.activation_checkpointing.activation_checkpointed` as well, their inputs are what waits there.
    A step that is compiled whole is refused: where tensors wait is then the compiler's.

    Source: ``torch.autograd.graph.save_on_cpu``, which takes parameters along.

    Args:
        module: Changed in place, and returned, for the use in a factory.
        blocks: As :func:`~forgather_fn.activation_checkpointing.activation_checkpointed` takes them.
        least_bytes: Smaller tensors stay.

    Raises:
        ValueError: A block chooses no module, or ``least_bytes`` is negative.

    Example:
        >>> model = activation_offloaded(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "*")
        >>> model(torch.ones(1, 2)).sum().backward()
    """
    if least_bytes < 0:
        raise ValueError(f"activation_offloaded: least_bytes must be at least 0, got {least_bytes}")
    for block in blocks_of(module, blocks, "activation_offloaded", "its loss keeps as much: choose blocks in it"):
        if not isinstance(vars(block).get("forward"), _Offloaded):
            block.forward = _Offloaded(block, block.forward, least_bytes)
    return module


@attrs.frozen(eq=False)
class _Offloaded:
    """The forward of a block. An object and not a closure, so that a copy of the module has one of its own."""

    module: nn.Module
    __wrapped__: Callable[..., Any]
    least_bytes: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        own = frozenset(t.untyped_storage()._cdata for t in (*self.module.parameters(), *self.module.buffers()))

        def pack(tensor: Tensor) -> "_Host | _Kept":
            small = tensor.numel() * tensor.element_size() < self.least_bytes
            stays = small or _on_host(tensor) or tensor.untyped_storage()._cdata in own
            return _Kept(tensor.detach(), tensor._version) if stays else _sent(tensor)

        with saved_tensors_hooks(pack, lambda held: held.fetched()):
            return self.__wrapped__(*args, **kwargs)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _sent(tensor: Tensor) -> "_Host":
    """Copy to pinned memory; the stream that computes orders the copy, and that back, as all else."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return _Host(host, tensor.device)


@attrs.frozen(eq=False)
class _Host:
    """A tensor that waits on the host, and where it came from."""

    tensor: Tensor
    device: torch.device

    def fetched(self) -> Tensor:
        """Bring it back."""
        return self.tensor.to(self.device, non_blocking=True)


@attrs.frozen(eq=False)
class _Kept:
    """A tensor that stays where it is; torch does not look at versions where there are hooks."""

    tensor: Tensor
    version: int

    def fetched(self) -> Tensor:
        """Give it.

        Raises:
            RuntimeError: It was changed in place meanwhile, so that gradients would be wrong.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass of an offloaded block needs has "
                "been modified by an inplace operation since the forward pass"
            )
        return self.tensor
