"""The optimizers that arguments name, and which parameters decay."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from forgather.ml.trainer.enums import OptimizerNames

if TYPE_CHECKING:
    from forgather.ml.trainer.arguments import TrainingArguments

NO_DECAY: Final = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Parameters whose lower-case names have one of these do not decay."""

TAKES: Final[Mapping[OptimizerNames, tuple[str, ...]]] = {
    OptimizerNames.SGD: ("momentum", "dampening", "weight_decay", "nesterov"),
    OptimizerNames.ADAGRAD: ("lr_decay", "weight_decay", "eps"),
    OptimizerNames.RMSPROP: ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
"""What of ``optim_args`` an optimizer takes; the others take none."""

_SWITCHES: Final = ("nesterov", "centered")


def optimizer_class_and_kwargs(args: "TrainingArguments") -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Give the class of the optimizer that arguments name, and what it is made with, but for the parameters.

    Raises:
        ValueError: The optimizer is not honoured, or ``optim_args`` has what it does not take.
    """
    name = OptimizerNames(args.optim)
    given: dict[str, Any] = {"lr": args.learning_rate, **optim_args(name, args.optim_args)}
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == OptimizerNames.ADAMW_TORCH:
        return torch.optim.AdamW, given | adam
    if name == OptimizerNames.ADAMW_TORCH_FUSED:
        return torch.optim.AdamW, given | adam | {"fused": True}
    if name == OptimizerNames.ADAFACTOR:
        from forgather.ml.trainer.adafactor import Adafactor

        return Adafactor, given | {"scale_parameter": False, "relative_step": False}
    plain: dict[OptimizerNames, type[torch.optim.Optimizer]] = {
        OptimizerNames.SGD: torch.optim.SGD,
        OptimizerNames.ADAGRAD: torch.optim.Adagrad,
        OptimizerNames.RMSPROP: torch.optim.RMSprop,
    }
    if name not in plain:
        raise ValueError(f"optim={name.value!r} is not supported")
    return plain[name], given


def optim_args(name: OptimizerNames, text: str | None) -> dict[str, float | bool]:
    """Read ``optim_args``: ``"momentum=0.9, nesterov=True"``.

    Raises:
        ValueError: It is not of this form, or the optimizer does not take it.

    Example:
        >>> optim_args(OptimizerNames.SGD, "momentum=0.9, nesterov=True")
        {'momentum': 0.9, 'nesterov': True}
    """
    found: dict[str, float | bool] = {}
    takes = TAKES.get(name, ())
    for pair in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals or key not in takes:
            can = f"takes {', '.join(takes)}" if takes else "takes none; see adam_beta1, adam_beta2, adam_epsilon"
            raise ValueError(f"optim_args={text!r}: {pair!r} is not one: {name.value} {can}")
        if key in _SWITCHES:
            found[key] = value.lower() in ("true", "1", "yes")
            continue
        try:
            found[key] = float(value)
        except ValueError:
            raise ValueError(f"optim_args={text!r}: {pair!r} has no number") from None
    return found


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Name the parameters that decay: all but biases and those of normalisation layers.

    As transformers 5.23 has it: what lies in an ``nn.LayerNorm``, or matches :data:`NO_DECAY`, does not decay.

    Example:
        >>> decay_parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        ['0.weight']
    """
    return [name for name in _outside_layer_norms(model, "") if not NO_DECAY.search(name.lower())]


def _outside_layer_norms(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if not isinstance(child, nn.LayerNorm):
            yield from _outside_layer_norms(child, f"{prefix}{name}.")
    yield from (prefix + name for name in module._parameters)
