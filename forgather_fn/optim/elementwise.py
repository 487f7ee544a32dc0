"""Optimizers that update element by element, each as one rule: the same text in eager mode and in a graph."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from forgather_fn.finite import BAD
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import NO_VALUES, Values
from forgather_fn.optim.rows import Piece, pieces


class Rule(Protocol):
    """Give new values of a parameter and its slots; nothing is changed in place."""

    def __call__(
        self,
        piece: Piece,
        param: Tensor,
        gradient: Tensor,
        /,
        *slots: Tensor,
        rate: float | Tensor,
        decay: float | Tensor,
    ) -> Sequence[Tensor]:
        """Give the new parameter, then the new slots.

        Tensors are in float32 at least. ``rate`` and ``decay`` are numbers, or float64 tensors that broadcast against
        them; :func:`~forgather_fn.optim.rows.like` brings what is computed of them to the parameter's type.
        """
        ...


def updated(
    rule: Rule,
    gradients: Gradients,
    params: Flat,
    *slots: Flat,
    learning_rate: float | Tensor,
    found_inf: Tensor,
    scheduled: Values = NO_VALUES,
) -> None:
    """Apply a rule to all parameters that have a gradient, in place; nothing changes where ``found_inf`` is 1."""
    if found_inf is BAD:
        return
    gradients = gradients.resolved()
    for piece in pieces(gradients, params, *slots):
        rate, decay = piece.hypers(params.layout, learning_rate, scheduled)
        param, gradient, *own = piece.tensors
        piece.write(rule(piece, param, gradient, *own, rate=rate, decay=decay), gradients.active, found_inf)
