"""At least float32: sums, norms and losses of numbers in half precision would lose what is added to them."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give float32 for narrower data types, and any other as it is.

    Example:
        >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


def wide(tensor: Tensor) -> Tensor:
    """Give a tensor in float32 at least; itself where it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def wide_norm(tensor: Tensor, dim: tuple[int, ...] | None = None, *, keepdim: bool = False) -> Tensor:
    """Compute the 2-norm in float32 at least, over all dimensions or some, as ``torch.linalg.vector_norm`` does."""
    dtype = torch.float32 if tensor.dtype.itemsize < 4 else None
    found: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=keepdim, dtype=dtype)
    return found
