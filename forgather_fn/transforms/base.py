"""What transforms are, and how they are put together."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
from torch import Tensor

from forgather_fn.describe import describe, described
from forgather_fn.gradient import Gradients
from forgather_fn.signature import checked, shown


class TransformInit(Protocol):
    """Make the state of a transform before the first step."""

    def __call__(self, params: Mapping[str, Tensor], /) -> Any:
        """Give a tree of tensors, or None."""
        ...


class TransformUpdate(Protocol):
    """Transform the gradient of one step."""

    def __call__(
        self,
        gradients: Gradients,
        state: Any,
        /,
        *,
        params: Mapping[str, Tensor],
        step: int | Tensor,
        seed: int | Tensor,
    ) -> tuple[Gradients | Mapping[str, Tensor], Any]:
        """Give the new gradient, as a value or as tensors by name, and the new state.

        ``gradients`` belongs to the transform and may be changed in place; ``state`` may not.
        """
        ...


@attrs.frozen(repr=False)
class Transform:
    """A pair of pure functions between the gradient and the optimizer. Compose them with :func:`chain`.

    Attributes:
        init: Makes the state.
        update: Transforms one gradient.
        description: How it prints.
        defers: Whether ``update`` leaves values as they are and works by :meth:`Gradients.divided` alone; then what
            others have put off may stay so.
        compiles: Whether ``update`` is tensor operations alone, so that it can be part of a graph; ``step`` is a scalar
            tensor there.
        elementwise: Whether ``update`` works element by element and by :meth:`Gradients.norm` alone, so that a process
            may have shards of the gradient only.
    """

    init: TransformInit
    update: TransformUpdate
    description: str = ""
    defers: bool = False
    compiles: bool = True
    elementwise: bool = False

    def __repr__(self) -> str:
        return self.description or f"Transform({describe(self.update)})"


def apply(
    transform: Transform,
    gradients: Gradients,
    state: Any,
    *,
    params: Mapping[str, Tensor],
    step: int | Tensor,
    seed: int | Tensor,
) -> tuple[Gradients, Any]:
    """Run one transform, and check what it returns.

    Raises:
        ValueError: It changed names, shapes, or data types.
    """
    if not transform.defers:
        gradients = gradients.resolved().unmeasured()
    result, state = transform.update(gradients, state, params=params, step=step, seed=seed)
    if not isinstance(result, Gradients):
        result = gradients.replaced(result, by=repr(transform))
    return result, state


def apply_all(
    transforms: Sequence[Transform],
    gradients: Gradients,
    states: tuple[Any, ...],
    *,
    params: Mapping[str, Tensor],
    step: int | Tensor,
    seed: int | Tensor,
) -> tuple[Gradients, tuple[Any, ...]]:
    """Run transforms one after the other, each with its state.

    Returns:
        The gradient, and the new states: the same tuple, where each of them is the same.
    """
    new = []
    for transform, held in zip(transforms, states, strict=True):
        gradients, held = apply(transform, gradients, held, params=params, step=step, seed=seed)
        new.append(held)
    return gradients, states if all(map(operator.is_, new, states)) else tuple(new)


@described
def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other, as one.

    Example:
        >>> import forgather_fn as ff
        >>> ff.chain(ff.clipped(1.0), ff.noise(0.1))
        chain(clipped(max_norm=1.0), noise(std=0.1))

    Raises:
        ValueError: One of them is none.
    """
    for one in transforms:
        if not isinstance(one, Transform):
            raise ValueError(
                f"chain: {shown(one)} is not a transform, such as ff.clipped(1.0) or ff.stateless(function)"
            )

    def init(params: Mapping[str, Tensor]) -> Any:
        return tuple(transform.init(params) for transform in transforms)

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        return apply_all(transforms, gradients, state, params=params, step=step, seed=seed)

    return Transform(
        init,
        update,
        defers=True,
        compiles=all(transform.compiles for transform in transforms),
        elementwise=all(transform.elementwise for transform in transforms),
    )


@checked
def stateless(function: Callable[[Tensor], Tensor]) -> Transform:
    """Make a transform of a function on one tensor, applied to every gradient by itself.

    Example:
        >>> def doubled(gradient):
        ...     return 2.0 * gradient
        >>> twice = stateless(doubled)
    """

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Mapping[str, Tensor], Any]:
        del params, step, seed
        return {name: function(gradient) for name, gradient in gradients.items()}, state

    return Transform(nothing, update, description=f"stateless({describe(function)})")


def nothing(params: Mapping[str, Tensor]) -> None:
    """Keep no state."""
    del params
