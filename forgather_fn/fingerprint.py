"""One short text for the bits of many tensors."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors (SHA-256) by sorted name, data type, shape, and bytes: 64 hexadecimal digits.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.tensor([0.0, -0.0])})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return digest.hexdigest()
