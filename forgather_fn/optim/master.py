"""Parameters in half precision with a master copy in float32."""

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_optimizer


@described
def master_weights(optimizer: Optimizer) -> Optimizer:
    """Keep a float32 copy of parameters in half precision, update that, and round it to them.

    An update smaller than half the distance to the next bfloat16, which is lost otherwise, adds up in the copy. The
    optimizer works on the copies, and on those parameters that are in float32 themselves, and keeps its slots in
    float32: a run is that of the float32 parameters, with a model that sees them rounded. Take bfloat16 parameters for
    less memory in forward and backward; autocast (``Plan(precision="bfloat16")``) keeps float32 ones and rounds at each
    use. What is written to the parameters from outside does not reach the copy, and is lost at the next update.

    Args:
        optimizer: Of the copies. Where no parameter is in half precision, there are none, and it works as alone.

    Raises:
        ValueError: It is not an optimizer of this library.
    """
    check_optimizer("master_weights", optimizer)

    def init(params: Flat) -> OptState:
        layouts = _layouts(params.layout)
        master = Flat(layouts.master, tuple(params.buffers[i].float() for i in layouts.halves))
        return {"master": master, "optimizer": optimizer.init(_wide(params, master))}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        wide = _wide(params, state["master"])
        inner = optimizer.update(_widened(gradients, wide.layout), state["optimizer"], wide, context)
        for half, whole in zip(*(_written(flat, gradients.active) for flat in (params, wide)), strict=True):
            if half is not whole:
                half.copy_(whole)
        return state if inner is state["optimizer"] else {**state, "optimizer": inner}

    def evaluated(state: OptState, params: Flat) -> Flat:
        assert optimizer.evaluated is not None
        found = optimizer.evaluated(state["optimizer"], _wide(params, state["master"]))
        pairs = zip(found.buffers, params.layout.dtypes, strict=True)
        return Flat(params.layout, tuple(buffer.to(dtype) for buffer, dtype in pairs))

    return attrs.evolve(
        optimizer,
        init=init,
        update=update,
        elementwise=False,  # a checkpoint of shards takes slots to be in the parameters' types
        evaluated=None if optimizer.evaluated is None else evaluated,
        description="",
    )


@attrs.frozen(eq=False)
class Layouts:
    """How parameters with a master copy lie.

    Attributes:
        halves: The buffers that are in half precision.
        master: The layout of their copies.
        wide: Of all parameters, as the optimizer is given them.
    """

    halves: tuple[int, ...]
    master: Layout
    wide: Layout


_KNOWN: WeakKeyDictionary[Layout, Layouts] = WeakKeyDictionary()


def _layouts(layout: Layout) -> Layouts:
    """Find which buffers are copied. A copy has the offsets of the original, so that one is written to the other."""
    if layout not in _KNOWN:
        halves = tuple(i for i, dtype in enumerate(layout.dtypes) if dtype.itemsize < 4)
        leaves = tuple(
            attrs.evolve(leaf, dtype=torch.float32) if leaf.buffer in halves else leaf for leaf in layout.leaves
        )
        dtypes = tuple(torch.float32 if i in halves else dtype for i, dtype in enumerate(layout.dtypes))
        wide = Layout(leaves, layout.groups, layout.sizes, dtypes, layout.index, layout.elements)
        own = tuple(attrs.evolve(leaf, buffer=halves.index(leaf.buffer)) for leaf in leaves if leaf.buffer in halves)
        master = Layout(
            own,
            layout.groups,
            tuple(layout.sizes[i] for i in halves),
            (torch.float32,) * len(halves),
            {leaf.name: i for i, leaf in enumerate(own)},
            sum(math.prod(leaf.shape) for leaf in own),
        )
        _KNOWN[layout] = Layouts(halves, master, wide)
    return _KNOWN[layout]


def _wide(params: Flat, master: Flat) -> Flat:
    """Give the parameters with their copies in the place of those in half precision; made once."""
    known = params.kept.get("wide")
    if known is None or known[0] is not master:
        layouts = _layouts(params.layout)
        copies = dict(zip(layouts.halves, master.buffers, strict=True))
        buffers = tuple(copies.get(i, buffer) for i, buffer in enumerate(params.buffers))
        known = params.kept["wide"] = (master, Flat(layouts.wide, buffers))
    found: Flat = known[1]
    return found


def _widened(gradients: Gradients, layout: Layout) -> Gradients:
    """Give the gradient in the types of the copies."""
    types = {leaf.name: leaf.dtype for leaf in layout.leaves}
    flat = gradients.flat
    if flat is not None:
        flat = Flat(layout, tuple(b.to(dtype) for b, dtype in zip(flat.buffers, layout.dtypes, strict=True)))
    views = {name: view.to(types[name]) if flat is None else flat[name] for name, view in gradients.views.items()}
    return attrs.evolve(gradients, layout=layout, views=views, flat=flat, known_norm=None)


def _written(flat: Flat, active: tuple[bool, ...]) -> Sequence[Tensor]:
    """Give what an update may have written to: whole buffers, or ranges of them."""
    return flat.buffers if all(active) else flat.slices(flat.layout.runs(active))
