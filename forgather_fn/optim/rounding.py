"""Stochastic rounding: up or down by chance, so that what is rounded off is right on average.

The chance is a hash of where it is used, computed by tensor operations: a graph cannot seed a generator, and a number
must not depend on how tensors are stored, or on which are rounded together.
"""

import hashlib
from typing import Final

import torch
from torch import Tensor

_MASK: Final = 0xFFFFFFFF


def bfloat16_bits(value: Tensor, chance: Tensor) -> Tensor:
    """Round float32 numbers to one of their two neighbours in bfloat16, which they stay float32 with.

    The nearer one is the more likely in proportion, so that the mean over all chances is the number itself.

    Args:
        value: Finite float32 numbers.
        chance: Integers in [0, 2**16), uniform.
    """
    bits = value.view(torch.int32)
    rounded: Tensor = ((bits + chance.to(torch.int32)) & -0x10000).view(torch.float32)
    return rounded


def drawn(index: Tensor, step: int | Tensor, seed: int | Tensor) -> Tensor:
    """Draw 32 bits for each element of a parameter at a step.

    Args:
        index: Of the element in its parameter, int64.
        step: Of the run.
        seed: Of the run.

    Returns:
        int64 of the shape of ``index``.
    """
    device = index.device
    low, high = _int(seed, device) & _MASK, (_int(seed, device) >> 32) & _MASK
    stream = _mixed(_mixed(_mixed(low) ^ high) ^ (_int(step, device) & _MASK))
    return _mixed((index & _MASK) ^ stream)


def chances(bits: Tensor, salt: int) -> Tensor:
    """Make integers in [0, 2**16) of what was drawn, others for each salt; see :func:`salt_of`."""
    return (_mixed(bits ^ salt) >> 8) & 0xFFFF


def salt_of(name: str) -> int:
    """Hash a name to 32 bits.

    Example:
        >>> salt_of("weight") == salt_of("bias")
        False
    """
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=4).digest(), "little")


def _int(value: int | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device=device)


def _mixed(x: Tensor) -> Tensor:
    """Mix 32 bits, held in int64: Wellons' ``lowbias32``.

    Its second factor is above 2**31; less 2**32 it is the same modulo that, and nothing overflows.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & _MASK
    return x ^ (x >> 16)
