"""What a loss is: a function of (outputs, batch) that gives a sum and its weight."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from torch import Tensor, nn

from forgather_fn.describe import describe
from forgather_fn.mean import Mean

if TYPE_CHECKING:
    from forgather_fn.losses.terms import Terms

RESERVED = ("beta1", "beta2", "grad_norm", "learning_rate", "loss_scale", "momentum", "weight_decay")
"""Metrics that steps report themselves."""


Arguments = Callable[[Any], tuple[Sequence[Any], dict[str, Any]]]
"""How a model is called on a batch: ``batch -> (positional arguments, keyword arguments)``."""


class Loss(Protocol):
    """What a plan minimises: any function of the model's outputs and the batch.

    It returns a :class:`~forgather_fn.mean.Mean`, or a mapping of named ones of which ``"loss"`` is minimised and the
    others are reported. The weight of the objective must be a function of the batch alone; a loss that can give it
    before the forward pass is an :class:`Objective`.
    """

    def __call__(self, outputs: Any, batch: Any, /) -> Mean | Mapping[str, Mean]:
        """Give the sum of the losses of a (micro)batch, and how many it is a sum over."""
        ...


class Total(Protocol):
    """Sum up the losses of a (micro)batch."""

    def __call__(self, outputs: Any, batch: Any, /) -> Tensor | Mapping[str, Tensor | Mean]:
        """Give a scalar; or several by name, ``"loss"`` among them, where others are to be reported.

        A scalar is a sum over what the objective is a sum over; a mean has a weight of its own.
        """
        ...


@attrs.frozen(repr=False)
class Objective:
    """A loss whose weight is known from the batch, before the forward pass.

    Attributes:
        total: ``(outputs, batch) -> scalar tensor``, the sum of the losses; or several sums, by name.
        weight: ``batch -> scalar tensor or number``, what it is a sum over.
        withheld: Keys of a dict batch that are for the loss alone and not passed to the model.
        passes_weight: Whether models of Hugging Face are given the weight as ``num_items_in_batch``.
        description: How it prints.
        arguments: ``batch -> (positional, keyword)``: how the model is called, where the loss knows better than the
            batch's form tells.
        terms: What it is a sum of, where it is one over elements (tokens, samples): then it can be weighted, masked,
            and added to, and metrics know which predictions belong to which targets.
        couples: Why its samples cannot be taken apart; "" where each has a loss of its own. Such a batch is not cut
            into microbatches.
        around: ``module -> context`` in which the module is called for this loss, where it needs another output.
    """

    total: Total
    weight: Callable[[Any], Tensor | float]
    withheld: tuple[str, ...] = ()
    passes_weight: bool = False
    description: str = ""
    arguments: Arguments | None = None
    terms: "Terms | None" = None
    couples: str = ""
    around: Callable[[nn.Module], AbstractContextManager[None]] | None = None

    def __call__(self, outputs: Any, batch: Any) -> Mean | dict[str, Mean]:
        """Give the sum of the losses and its weight; or several, by name."""
        return self.weighed(outputs, batch, self.weight(batch))

    def weighed(self, outputs: Any, batch: Any, weight: Tensor | float) -> Mean | dict[str, Mean]:
        """Do the same for a batch whose weight has been found already."""
        total = self.total(outputs, batch)
        if isinstance(total, Tensor):
            return Mean(total, weight)
        return {name: one if isinstance(one, Mean) else Mean(one, weight) for name, one in total.items()}

    def __repr__(self) -> str:
        return self.description or f"Objective({describe(self.total)})"


def named_means(result: Any) -> dict[str, Mean]:
    """Read what a loss returned: one mean is the objective, a mapping must name it ``"loss"``.

    Raises:
        ValueError: It is not a mean or a mapping of means, the objective is not a differentiable scalar, or the
            objective's weight depends on the model.
    """
    means = {"loss": result} if isinstance(result, Mean) or not isinstance(result, Mapping) else dict(result)
    for name, mean in means.items():
        if not isinstance(mean, Mean):
            given = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
            raise ValueError(
                f"the loss returned {given} for {name!r}; expected a Mean(total, weight), so that parts of a batch can "
                "be added. Return Mean(losses.sum(), losses.numel()), or use losses.from_output(weight=...)."
            )
        if not isinstance(mean.total, Tensor):
            raise ValueError(f"{name!r}: the total of a Mean must be a scalar tensor, got {mean.total!r}")
        if mean.total.dim() != 0:
            raise ValueError(f"{name!r}: the total of a Mean must be a scalar, got shape {tuple(mean.total.shape)}")
    if len(means) > 1 and any(name in means for name in RESERVED):
        raise ValueError(
            f"the loss named a mean {sorted(means.keys() & set(RESERVED))}, which a step reports itself; rename it"
        )
    if "loss" not in means:
        raise ValueError(f"the loss returned {sorted(means)}; the objective must be named 'loss'")
    weight = means["loss"].weight
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real) or not float(weight) >= 0:
            raise ValueError(
                f"the weight of the objective must be a number of at least 0, or a scalar tensor: {weight!r}"
            )
    elif weight.dim() != 0:
        raise ValueError(f"the weight of the objective must be a scalar, got shape {tuple(weight.shape)}; sum it up")
    elif weight.requires_grad:
        raise ValueError("the weight of the objective depends on the model; it must be a function of the batch alone")
    return means
