"""A short text for the bits of many tensors, and a number for a text."""

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


def number_of(text: str) -> int:
    """Make a number of a text, the same in every process: at least 0, of 63 bits.

    Example:
        >>> number_of("a") == number_of("a"), number_of("a") < 2**63
        (True, True)
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
