"""The calls of fused kernels that an element-wise update is."""

from collections.abc import Sequence

import attrs
from torch import Tensor

from forgather_fn.flat import Chunk, Flat, Hyper
from forgather_fn.gradient import Gradients


@attrs.frozen(eq=False)
class KernelCall:
    """The tensors of one group and data type, which one call of a fused kernel updates.

    Attributes:
        hyper: The hyperparameters of the group.
        chunks: Where they lie.
        params: Ranges of the parameters.
        slots: The same ranges of each slot.
    """

    hyper: Hyper
    chunks: tuple[Chunk, ...]
    params: list[Tensor]
    slots: tuple[list[Tensor], ...]


def kernel_calls(gradients: Gradients, params: Flat, *slots: Flat, together: bool = True) -> list[KernelCall]:
    """Sort what an element-wise update works on by group: one call of a fused kernel each.

    The lists are made once and shared by later steps as long as the same parameters get gradients.

    Args:
        gradients: Of this step.
        params: To be updated.
        slots: In the layout of the parameters.
        together: Whether neighbours of one group may be updated as one tensor. The bits are the same either way.
    """
    layout, active = gradients.layout, gradients.active
    cut = layout.singles if gradients.flat is None else layout.runs if together else layout.spans
    chunks = cut(active)
    found = params.kept.get("kernel calls")
    if found is None or found[0] is not chunks or not _same(found[1], slots):
        found = params.kept["kernel calls"] = (chunks, slots, _calls(chunks, params, slots))
    result: list[KernelCall] = found[2]
    return result


def _same(ones: Sequence[Flat], others: Sequence[Flat]) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def _calls(chunks: tuple[Chunk, ...], params: Flat, slots: Sequence[Flat]) -> list[KernelCall]:
    result = []
    for buffer, group in dict.fromkeys((chunk.buffer, chunk.group) for chunk in chunks):
        own = tuple(chunk for chunk in chunks if (chunk.buffer, chunk.group) == (buffer, group))
        lists = tuple(list(flat.slices(own)) for flat in (params, *slots))
        result.append(KernelCall(params.layout.groups[group], own, lists[0], lists[1:]))
    return result
