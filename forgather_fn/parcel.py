"""A few numbers that travel behind a gradient, in the same transfer, and arrive as they are.

A transfer costs far more for being one than for being longer, so there is one a step. What travels is added up over
processes in the data type of the gradient, which may be bfloat16; numbers in float64 survive that because each process
has a place of its own for them, where the others have zeros, and writes them byte by byte.
"""

from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor

from forgather_fn.world import World

_BYTES: Final = 8


@attrs.frozen(eq=False)
class Parcel:
    """What has arrived.

    Attributes:
        counts: On how many processes each flag was set, shape (flags,).
        rows: The numbers of each process, float64, shape (processes, numbers).
    """

    counts: Tensor
    rows: Tensor


def size(flags: int, numbers: int, processes: int) -> int:
    """Count the elements of a parcel."""
    return flags + _BYTES * numbers * processes


def packed(flags: Sequence[bool], numbers: Tensor, world: World, dtype: torch.dtype) -> Tensor:
    """Write flags and numbers, float64, of this process as elements that are exact in any floating data type."""
    places = torch.zeros(world.size, _BYTES * len(numbers), dtype=dtype, device=numbers.device)
    places[world.rank] = numbers.view(torch.uint8)
    return torch.cat([flagged(flags, dtype, numbers.device), places.view(-1)])


def flagged(flags: Sequence[bool], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Write flags as numbers; most often all are set, which takes one call whatever their number."""
    if all(flags):
        return torch.ones(len(flags), dtype=dtype, device=device)
    return torch.tensor(flags, dtype=dtype, device=device)


def behind(buffer: Tensor, parcel: Tensor) -> Tensor:
    """Put a parcel behind a buffer, in its memory where there is room; otherwise both are copied."""
    end, more = len(buffer), len(parcel)
    if buffer.untyped_storage().nbytes() < (end + more) * buffer.element_size():
        return torch.cat([buffer, parcel])
    whole = buffer.as_strided((end + more,), (1,), 0)
    whole[end:] = parcel
    return whole


def opened(parcel: Tensor, flags: int, world: World) -> Parcel:
    """Read what was added up over all processes."""
    rows = parcel[flags:].to(torch.uint8).view(torch.float64).view(world.size, -1)
    return Parcel(parcel[:flags], rows)


def paired(rows: Tensor) -> Tensor:
    """Add up rows in aligned pairs of processes: the same sum, to the bit, on every process that has them.

    Example:
        >>> paired(torch.tensor([[1.0], [2.0], [4.0]]))
        tensor([7.])
    """
    while len(rows) > 1:
        pairs = len(rows) // 2
        rows = torch.cat([rows[0 : 2 * pairs : 2] + rows[1 : 2 * pairs : 2], rows[2 * pairs :]])
    return rows[0]
