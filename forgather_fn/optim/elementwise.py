"""Optimizers that update element by element, each as one rule: the same text in eager mode and in a graph."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from forgather_fn.finite import BAD
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import Scalar
from forgather_fn.optim.base import UpdateContext
from forgather_fn.optim.rows import operands


class Rule(Protocol):
    """Give new values of a parameter and its slots; nothing is changed in place."""

    def __call__(
        self,
        param: Tensor,
        gradient: Tensor,
        slots: Sequence[Tensor],
        rate: Scalar,
        decay: Scalar,
        /,
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
    context: UpdateContext,
) -> None:
    """Apply a rule to all parameters that have a gradient, in place; nothing changes where ``found_inf`` is 1."""
    if context.found_inf is BAD:
        return
    gradients = gradients.resolved()
    for each in operands(gradients, params, *slots):
        rate, decay = each.hypers(params.layout, context)
        param, gradient, *own = each.tensors
        each.write(rule(param, gradient, own, rate, decay), gradients.active, context.found_inf)
