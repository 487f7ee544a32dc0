"""The calls of fused kernels that an element-wise update is."""

import operator
from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from forgather_fn.flat import CUTS_KEPT, Chunk, Flat, Hyper
from forgather_fn.gradient import Gradients


@attrs.frozen(eq=False)
class KernelCall:
    """The tensors of one group and data type, which one call of a fused kernel updates.

    Attributes:
        hyper: The hyperparameters of the group.
        chunks: Where they lie.
        params: Ranges of the parameters.
        slots: The same ranges of each slot.
        counts: How often each has been updated, a scalar for each, where that is kept.
    """

    hyper: Hyper
    chunks: tuple[Chunk, ...]
    params: list[Tensor]
    slots: tuple[list[Tensor], ...]
    counts: list[Tensor]


def kernel_calls(
    gradients: Gradients, params: Flat, *slots: Flat, together: bool = True, count: Tensor | None = None
) -> list[KernelCall]:
    """Sort what an element-wise update works on by group: one call of a fused kernel each.

    The lists are made once and shared by later steps as long as the same parameters get gradients.

    Args:
        gradients: Of this step.
        params: To be updated.
        slots: In the layout of the parameters.
        together: Whether neighbours of one group may be updated as one tensor. The bits are the same either way.
        count: How often each leaf has been updated, where that is kept.
    """
    layout, active = gradients.layout, gradients.active
    cut = layout.singles if gradients.flat is None else layout.runs if together else layout.spans
    chunks = cut(active)
    given = (chunks, count, *slots)
    known: dict[int, tuple[tuple[Any, ...], list[KernelCall]]] = params.kept.setdefault("kernel calls", {})
    found = known.get(id(chunks))
    if found is None or len(found[0]) != len(given) or not all(map(operator.is_, found[0], given)):
        if len(known) >= CUTS_KEPT + len(params):
            known.clear()
        found = known[id(chunks)] = (given, _calls(chunks, params, slots, count))
    return found[1]


def _calls(chunks: tuple[Chunk, ...], params: Flat, slots: Sequence[Flat], count: Tensor | None) -> list[KernelCall]:
    result = []
    for buffer, group in dict.fromkeys((chunk.buffer, chunk.group) for chunk in chunks):
        own = tuple(chunk for chunk in chunks if (chunk.buffer, chunk.group) == (buffer, group))
        lists = tuple(list(flat.slices(own)) for flat in (params, *slots))
        counts = [] if count is None else [count[chunk.first] for chunk in own]
        result.append(KernelCall(params.layout.groups[group], own, lists[0], lists[1:], counts))
    return result
