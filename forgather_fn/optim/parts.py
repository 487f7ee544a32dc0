"""The parts that element-wise updates work on."""

import operator
from collections.abc import Sequence

import attrs
from torch import Tensor

from forgather_fn.flat import CUTS_KEPT, Chunk, Flat, Hyper
from forgather_fn.gradient import Gradients


@attrs.frozen(eq=False)
class Part:
    """The tensors of one group and data type that one kernel call updates.

    Attributes:
        hyper: The hyperparameters of the group.
        chunks: Where they lie.
        params: Parts of the parameters.
        slots: Parts of each slot.
    """

    hyper: Hyper
    chunks: tuple[Chunk, ...]
    params: list[Tensor]
    slots: tuple[list[Tensor], ...]


def parts(gradients: Gradients, params: Flat, *slots: Flat, together: bool = True) -> list[Part]:
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
    known: dict[int, tuple[tuple[Chunk, ...], tuple[Flat, ...], list[Part]]] = params.kept.setdefault("parts", {})
    found = known.get(id(chunks))
    if found is None or found[0] is not chunks or not _same(found[1], slots):
        if len(known) >= CUTS_KEPT + len(params):
            known.clear()
        found = known[id(chunks)] = (chunks, slots, _parts(chunks, params, slots))
    return found[2]


def _same(ones: Sequence[Flat], others: Sequence[Flat]) -> bool:
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def _parts(chunks: tuple[Chunk, ...], params: Flat, slots: Sequence[Flat]) -> list[Part]:
    result = []
    for buffer, group in dict.fromkeys((chunk.buffer, chunk.group) for chunk in chunks):
        own = tuple(chunk for chunk in chunks if (chunk.buffer, chunk.group) == (buffer, group))
        lists = tuple(list(flat.pieces(own)) for flat in (params, *slots))
        result.append(Part(params.layout.groups[group], own, lists[0], lists[1:]))
    return result
