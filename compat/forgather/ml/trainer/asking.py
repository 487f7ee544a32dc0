"""What a model and a loss function take, and where outputs have their loss."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function can be given a keyword; a module passes what it is called with on to its forward."""
    parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Tell whether a model is given ``num_items_in_batch``: it says so, or its forward takes any keyword."""
    model = unwrapped(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model that PEFT has wrapped, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def returned_loss(outputs: Any, inputs: Any) -> Tensor:
    """Find the loss that a model returned: under ``"loss"``, or first in a tuple.

    Raises:
        ValueError: There is none.
    """
    if isinstance(outputs, Mapping) and "loss" not in outputs:
        raise ValueError(
            f"The model did not return a loss from the inputs, only the following keys: {','.join(outputs.keys())}. "
            f"For reference, the inputs it received are {','.join(inputs) if isinstance(inputs, Mapping) else inputs}."
        )
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs if isinstance(outputs, Tensor) else outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"The model did not return a loss, but {shape}: return {{'loss': ...}} or (loss, logits), or give the "
            "trainer compute_loss_func=, which is called with the outputs and the labels."
        )
    return loss
