"""The form of what a module gives or takes: which part of it is the hidden state."""

from typing import Any

import attrs
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@attrs.frozen(eq=False)
class Form:
    """The form of what a module gives or takes: which leaf of it is the hidden state, and what is beside it.

    Attributes:
        spec: How it is nested.
        leaves: All but the hidden state; tensors are None, since none may cross a cut.
        place: Of the hidden state.
    """

    spec: Any
    leaves: tuple[Any, ...]
    place: int

    def holding(self, hidden: Tensor, within: Any = None) -> Any:
        """Put a hidden state into the form; what is beside it is that of ``within``, if that is given."""
        leaves = [*self.leaves] if within is None else tree_flatten(within)[0]
        leaves[self.place] = hidden
        return tree_unflatten(leaves, self.spec)


def form_of(value: Any) -> tuple[Form, Tensor] | None:
    """Find the hidden state, the first floating tensor; None if there is none."""
    leaves, spec = tree_flatten(value)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            kept = tuple(None if isinstance(other, Tensor) else other for other in leaves)
            return Form(spec, kept, place), leaf
    return None
