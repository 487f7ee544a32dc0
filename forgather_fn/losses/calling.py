"""How a model is called on a batch, for a loss."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from forgather_fn.flat import listed
from forgather_fn.losses.base import Arguments, Loss, Objective


def call_arguments(module: nn.Module, loss: Loss) -> Arguments:
    """Say how a module is called on a batch: ``batch -> (positional arguments, keyword arguments)``.

    A dict batch goes by keyword: the keys that ``forward`` takes (all, if it takes any), less those that the loss
    withholds, which are its targets. A tuple batch goes by position, less its last, the target; anything else is the
    one argument. An objective that has ``arguments`` of its own decides by itself.

    Raises:
        ValueError: When called: no key of the batch is an argument of ``forward``.
    """
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    objective = loss if isinstance(loss, Objective) else None
    if objective and objective.arguments:
        return objective.arguments
    withheld = objective.withheld if objective else ()
    counts = bool(objective and objective.passes_weight) and (
        "num_items_in_batch" in parameters or (takes_any and is_hugging_face(module))
    )

    def arguments(batch: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        if isinstance(batch, Mapping):
            given = {
                name: item for name, item in batch.items() if (takes_any or name in parameters) and name not in withheld
            }
            if not given:
                raise ValueError(
                    f"no key of the batch is an argument of {type(module).__name__}.forward: the batch has "
                    f"{listed(sorted(map(str, batch)))}, forward takes {listed(sorted(parameters))}"
                )
            if counts and objective:
                # At least one, since models divide by it, and nan times nothing is nan.
                given["num_items_in_batch"] = torch.as_tensor(objective.weight(batch)).clamp(min=1)
            return (), given
        if isinstance(batch, tuple | list):
            return (batch[:-1] if len(batch) > 1 else batch), {}
        return (batch,), {}

    return arguments


def is_hugging_face(module: nn.Module) -> bool:
    """Tell models of transformers apart without importing it."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)
