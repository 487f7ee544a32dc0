"""Optimizers: thin pairs of pure functions over torch's own maths."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from forgather_fn import flat as flat_storage
from forgather_fn import unfused
from forgather_fn.describe import describe, described
from forgather_fn.finite import applied
from forgather_fn.flat import Flat, Hyper
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices
from forgather_fn.parts import parts

OptState = Mapping[str, Any]


class OptimizerInit(Protocol):
    """Make the optimizer's state for these parameters."""

    def __call__(self, params: Flat, /) -> OptState:
        """Give slots by name: mappings in the layout of the parameters, tensors, numbers."""
        ...


class OptimizerUpdate(Protocol):
    """Apply one update."""

    def __call__(
        self,
        gradients: Gradients,
        state: OptState,
        params: Flat,
        /,
        *,
        learning_rate: float | Tensor,
        found_inf: Tensor,
    ) -> OptState:
        """Update ``params`` and the slots of ``state`` in place (they are donated), and give the new state.

        Where ``found_inf`` (a float32 scalar on the device) is 1 instead of 0, nothing must change. ``gradients`` may
        be used up. Parameters that it has no entry for are left untouched, their slots too.
        """
        ...


@attrs.frozen(repr=False)
class Optimizer:
    """What turns gradients into new parameters.

    Attributes:
        init: ``params -> state``.
        update: ``(gradients, state, params) -> state``, in place on what it is given. Those that need shapes read
            ``params[name]``; those that work element by element, :func:`parts`.
        groups: Name each parameter's hyperparameters: ``{name: tensor} -> {name: Hyper}``.
        description: How it prints.
        compiles: Whether ``update`` is tensor operations alone, so that it can be part of a graph; its learning rate is
            a scalar tensor there.
        separable: Whether updating parameter by parameter, in any order, is the same as updating all at once.
        elementwise: Whether every element is updated by itself, so that a process may have shards of parameters only.
    """

    init: OptimizerInit
    update: OptimizerUpdate
    groups: Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]]
    description: str = ""
    compiles: bool = True
    separable: bool = False
    elementwise: bool = False

    def __repr__(self) -> str:
        return self.description or f"Optimizer({describe(self.update)})"


def _adam_family(
    kernel: Callable[..., None],
    decoupled: bool,
    betas: tuple[float, float],
    eps: float,
    groups: Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]],
) -> Optimizer:
    """Make an optimizer of one of the fused kernels that ``torch.optim.Adam`` and ``AdamW`` call.

    Updates are counted by parameter, since one without a gradient is not updated; as in torch, the bias of its
    averages is corrected by its own count.
    """

    def init(params: Flat) -> OptState:
        count = torch.zeros(len(params), dtype=torch.float32, device=params.buffers[0].device)
        return {"exp_avg": params.map(torch.zeros_like), "exp_avg_sq": params.map(torch.zeros_like), "count": count}

    def update(
        gradients: Gradients, state: OptState, params: Flat, *, learning_rate: float | Tensor, found_inf: Tensor
    ) -> OptState:
        gradients = gradients.for_kernel()
        count = state["count"]
        compiling = torch.compiler.is_compiling()
        together = not compiling and _counted_alike(gradients, params, count)
        if all(gradients.active):
            count.add_(applied(found_inf))
        else:
            active = torch.tensor(gradients.active, dtype=count.dtype, device=count.device)
            count.add_(active * applied(found_inf))
        if compiling:
            unfused.adam(
                gradients,
                params,
                state["exp_avg"],
                state["exp_avg_sq"],
                count,
                decoupled=decoupled,
                learning_rate=learning_rate,
                betas=betas,
                eps=eps,
                found_inf=found_inf,
            )
            return state
        counts = _unbound(params, count)
        for part in parts(gradients, params, state["exp_avg"], state["exp_avg_sq"], together=together):
            kernel(
                part.params,
                gradients.pieces(part.chunks),
                part.slots[0],
                part.slots[1],
                [],
                [counts[chunk.first] for chunk in part.chunks],
                lr=learning_rate * part.hyper.learning_rate,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=part.hyper.weight_decay or 0.0,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=gradients.divisor,
                found_inf=found_inf,
            )
        return state

    return Optimizer(init, update, groups, separable=True, elementwise=True)


def _counted_alike(gradients: Gradients, params: Flat, count: Tensor) -> bool:
    """Tell whether all active parameters have been updated equally often, so that they may share a count.

    That holds as long as the same ones get a gradient at every update. Storage that is new here (a first step, a copy,
    a restored state) is asked once; that waits for the device.
    """
    known = params.kept.get("counted")
    if known is None or known[0] is not count:
        counts = list(itertools.compress(count.tolist(), gradients.active))
        known = (count, gradients.active if len(set(counts)) <= 1 else None)
    elif known[1] != gradients.active:
        known = (count, None)
    params.kept["counted"] = known
    return known[1] is not None


def _unbound(params: Flat, count: Tensor) -> Sequence[Tensor]:
    found = params.kept.get("counts")
    if found is None or found[0] is not count:
        found = params.kept["counts"] = (count, count.unbind())
    counts: Sequence[Tensor] = found[1]
    return counts


def _check_betas(name: str, betas: tuple[float, float], eps: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or eps < 0:
        raise ValueError(
            f"{name}: betas must be two numbers in [0, 1) and eps at least 0; got betas={betas}, eps={eps}"
        )


@described
def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam with decoupled weight decay: torch's own fused kernel over flat storage.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; equal to ``torch.optim.AdamW``.

    Args:
        betas: Decay of the running mean and of the running mean square, by update.
        eps: Added to the root of the mean square.
        weight_decay: Of those parameters that decay.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``betas`` are not in [0, 1), or ``eps`` is negative.
    """
    _check_betas("adamw", betas, eps)
    return _adam_family(torch._fused_adamw_, True, betas, eps, assigner(groups, weight_decay, decays))


@described
def adam(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam; weight decay, if any, is added to the gradient.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; equal to ``torch.optim.Adam``.
    The arguments are those of :func:`adamw`.
    """
    _check_betas("adam", betas, eps)
    return _adam_family(torch._fused_adam_, False, betas, eps, assigner(groups, weight_decay, decays))


@described
def sgd(
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Stochastic gradient descent, with momentum if asked for: equal to ``torch.optim.SGD``.

    Args:
        momentum: Decay of the running sum of gradients; 0 keeps none.
        nesterov: Look ahead along the momentum.
        weight_decay: Added to the gradient, for those parameters that decay.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``momentum`` is negative, or ``nesterov`` without it.
    """
    if momentum < 0 or (nesterov and momentum == 0):
        raise ValueError(f"sgd: momentum must be at least 0, and above 0 for nesterov; got {momentum}")

    def init(params: Flat) -> OptState:
        return {"momentum": params.map(torch.zeros_like)} if momentum else {}

    def update(
        gradients: Gradients, state: OptState, params: Flat, *, learning_rate: float | Tensor, found_inf: Tensor
    ) -> OptState:
        gradients = gradients.for_kernel()
        slots = [state["momentum"]] if momentum else []
        if torch.compiler.is_compiling():
            unfused.sgd(
                gradients,
                params,
                *slots,
                learning_rate=learning_rate,
                momentum=momentum,
                nesterov=nesterov,
                found_inf=found_inf,
            )
            return state
        for part in parts(gradients, params, *slots):
            kernel = torch._fused_sgd_ if _fused_sgd_is_right(part.params[0]) else _unfused_sgd
            kernel(
                part.params,
                gradients.pieces(part.chunks),
                part.slots[0] if momentum else [],
                weight_decay=part.hyper.weight_decay or 0.0,
                momentum=momentum,
                lr=learning_rate * part.hyper.learning_rate,
                dampening=0.0,
                nesterov=nesterov,
                maximize=False,
                is_first_step=False,
                grad_scale=gradients.divisor,
                found_inf=found_inf,
            )
        return state

    return Optimizer(init, update, assigner(groups, weight_decay, decays), separable=True, elementwise=True)


def _fused_sgd_is_right(tensor: Tensor) -> bool:
    """Tell where torch's fused kernel may be used: on CPUs its results in bfloat16 are wrong (seen in torch 2.13)."""
    return tensor.device.type != "cpu" or tensor.dtype.itemsize > 2


def _unfused_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor,
    is_first_step: bool,
    **options: Any,
) -> None:
    """Do what the fused kernel is for, on a CPU, where looking at the flag costs nothing."""
    assert not is_first_step
    if found_inf.item():
        return
    if grad_scale is not None:
        torch._foreach_div_(list(gradients), grad_scale)
    momentum_list: list[Tensor | None] = [*momenta] or [None] * len(params)
    torch_sgd(list(params), list(gradients), momentum_list, foreach=True, **options)


def slots_like(params: Flat) -> Flat:
    """Make a slot of zeros in the layout of the parameters, for optimizers of your own."""
    return flat_storage.zeros(params.layout, params.buffers[0].device)
