"""Adapters in the weights that they belong to: merged for good, taken out again, or folded in and begun anew."""

from collections.abc import Mapping
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.adapters.low_rank import NAME, Adapted, LowRank, adapters_of, check_free
from forgather_fn.describe import describe
from forgather_fn.optim.base import rewrite
from forgather_fn.program import Program
from forgather_fn.state import TrainState


def merged(module: nn.Module) -> nn.Module:
    """Add the adapters of a model to its weights and take them off: it is of its original class, and so its weights.

    Sums are taken in float32 or more, and rounded once. All parameters ask for gradients.

    Args:
        module: As ``program.export(state)`` gives it; changed in place, and returned.

    Raises:
        ValueError: It has no adapters, or stands on a state of a program.
    """
    check_free(module, "merged")
    for name, adapter in _adapters(module, "merged").items():
        layer = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer.forward, Adapted):
            raise ValueError(
                f"merged: the layer of {name} was wrapped by something else since: {describe(layer.forward)}"
            )
        _add(layer, adapter.delta(adapter.A.detach(), adapter.B.detach()))
        kept = layer.forward.__wrapped__
        del layer.forward
        if getattr(kept, "__self__", None) is not layer:  # an object that was there before, such as a recomputed block
            layer.forward = kept
        delattr(layer, NAME)
    return module.requires_grad_(True)


def unmerged(module: nn.Module, factors: Mapping[str, Tensor]) -> nn.Module:
    """Give a merged model its adapters back, and take them out of its weights: the inverse of :func:`merged`.

    A weight ``W`` comes back as ``W'`` with ``|W' - W| <= u (|W + D| + |W'|)``, where ``D`` is what the adapter added
    and ``u`` half the distance from 1 to the next number of the weight's type (2 to the -24 in float32).

    Args:
        module: Merged, and adapted anew by :func:`lora` with the same arguments; changed in place, and returned.
        factors: The factors that it was merged with, by name: the ``params`` of a state, or a ``state_dict``.

    Raises:
        ValueError: It has no adapters, it stands on a state of a program, or a factor is missing or of another shape.
    """
    check_free(module, "unmerged")
    for name, adapter in _adapters(module, "unmerged").items():
        prefix = name.removesuffix("weight") + NAME
        for factor, mine in (("A", adapter.A), ("B", adapter.B)):
            found = factors.get(f"{prefix}.{factor}")
            if found is None or found.shape != mine.shape:
                what = "missing" if found is None else f"of shape {tuple(found.shape)}, not {tuple(mine.shape)}"
                raise ValueError(f"unmerged: {prefix}.{factor} is {what}; give what the model was merged with")
            mine.data.copy_(found)
        _add(module.get_submodule(name.rpartition(".")[0]), -adapter.delta(adapter.A.detach(), adapter.B.detach()))
    return module


def restarted(program: Program, state: TrainState) -> TrainState:
    """Add the adapters of a state to its weights, and begin them anew at zero: the outputs stay, up to rounding.

    Done every few thousand steps, adapters of low rank make a change of high rank. Slots of the optimizer stay as they
    are, but for those that hold values of the parameters; an average begins anew. The state is not consumed.

    Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023.

    Args:
        program: Whose model has adapters.
        state: Of it.

    Raises:
        ValueError: The model has no adapters.
    """
    adapters = _adapters(program.module(), "restarted")
    new = state.copy()
    arrays = new.read()
    weights = dict(arrays.frozen)
    written = {}
    for name, adapter in adapters.items():
        prefix = name.removesuffix("weight") + NAME
        delta = adapter.delta(arrays.params[f"{prefix}.A"], arrays.params[f"{prefix}.B"])
        old = arrays.params[name] if name in arrays.params else weights[name]
        sum_ = (old.to(delta.dtype) + delta).to(old.dtype)
        if name in arrays.params:
            written[name] = old.copy_(sum_)
        else:
            weights[name] = sum_
        zero = f"{prefix}.{adapter.zero}"
        written[zero] = arrays.params[zero].zero_()
    rewrite(arrays.opt, written)
    if arrays.ema is not None:
        arrays.ema.assign(arrays.params)
    return attrs.evolve(new, arrays=attrs.evolve(arrays, frozen=weights))


def _adapters(module: nn.Module, what: str) -> dict[str, LowRank]:
    found = adapters_of(module)
    if not found:
        raise ValueError(f"{what}: {type(module).__name__} has no adapters; make some with ff.lora")
    return found


def _add(layer: nn.Module, delta: Tensor) -> None:
    weight = cast(nn.Parameter, layer.weight)
    weight.data = torch.empty_like(weight).copy_(weight.detach().to(delta.dtype) + delta)
