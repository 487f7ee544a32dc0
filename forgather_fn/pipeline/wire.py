"""How hidden states travel: flat, and of one length for all microbatches of a step, whose shapes may differ."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from forgather_fn.pipeline.line import Line

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIMENSIONS: Final = 6


@attrs.frozen
class Shape:
    """What a hidden state is like.

    Attributes:
        sizes: Of its dimensions.
        dtype: Of its elements.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return torch.Size(self.sizes).numel()


def shape_of(hidden: Tensor) -> Shape:
    """Tell what a hidden state is like."""
    return Shape(tuple(hidden.shape), hidden.dtype)


def packed(hidden: Tensor, length: int) -> Tensor:
    """Lay a hidden state flat, in memory of its own, with zeros up to a length."""
    flat = hidden.reshape(-1)
    return flat.clone() if len(flat) == length else torch.cat([flat, flat.new_zeros(length - len(flat))])


def unpacked(wire: Tensor, shape: Shape) -> Tensor:
    """Read a hidden state."""
    return (wire if len(wire) == shape.elements else wire[: shape.elements]).view(shape.sizes)


Run = Callable[[int, int, Tensor | None], Any]
"""``(stage, microbatch, hidden) -> hidden``; in the last stage, its result."""


def forward_only(line: Line, microbatches: Sequence[int], run: Run, device: torch.device) -> dict[int, Any]:
    """Run microbatches forward through all stages; shapes need not be known before, and are sent along.

    Each process runs its stages in their order, each over all microbatches. This works for every schedule; those of
    torch do not evaluate in all of them.

    Args:
        line: The processes.
        microbatches: Their numbers.
        run: Runs one stage of this process.
        device: Where hidden states are.

    Returns:
        What the last stage gave for each microbatch, on the process that has it; elsewhere nothing.
    """
    sent: list[tuple[Any, Tensor]] = []
    here: dict[tuple[int, int], Tensor] = {}
    results: dict[int, Any] = {}
    with line.world.explained():
        for stage in line.own:
            for number in microbatches:
                hidden = here.pop((stage, number), None)
                if stage and hidden is None:
                    hidden = _received(line, line.rank_of(stage - 1), device)
                result = run(stage, number, hidden)
                if stage == line.stages - 1:
                    results[number] = result
                elif line.rank_of(stage + 1) == line.rank:
                    here[stage + 1, number] = result
                else:
                    sent += _sent(line, line.rank_of(stage + 1), result)
        for work, _ in sent:
            work.wait()
    return results


def _sent(line: Line, to: int, hidden: Tensor) -> Iterable[tuple[Any, Tensor]]:
    from torch import distributed

    assert hidden.dim() <= _DIMENSIONS, hidden.shape
    sizes = [*hidden.shape, *(0 for _ in range(_DIMENSIONS - hidden.dim()))]
    header = torch.tensor([_DTYPES.index(hidden.dtype), hidden.dim(), *sizes], device=hidden.device)
    for tensor in (header, hidden.contiguous()):
        yield distributed.isend(tensor, group=line.group, group_dst=to), tensor


def _received(line: Line, source: int, device: torch.device) -> Tensor:
    from torch import distributed

    header = torch.empty(2 + _DIMENSIONS, dtype=torch.int64, device=device)
    distributed.recv(header, group=line.group, group_src=source)
    dtype, dimensions, *sizes = header.tolist()
    hidden = torch.empty(sizes[:dimensions], dtype=_DTYPES[dtype], device=device)
    distributed.recv(hidden, group=line.group, group_src=source)
    return hidden
