"""Gradients without their mean."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.gradient import Gradients
from forgather_fn.transforms.base import Transform, nothing


@described
def centralised() -> Transform:
    """Take the mean out of the gradient of each unit: of each row along the first dimension of tensors with several.

    Vectors and scalars are left as they are.

    Source: Yong et al., "Gradient Centralization", arXiv 2004.01461, equation 1.
    """

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, step, seed
        for view in gradients.views.values():
            if view.dim() > 1:
                view.sub_(view.mean(dim=tuple(range(1, view.dim())), keepdim=True))
        return gradients, state

    return Transform(nothing, update, elementwise=True)  # rows are whole on every process
