"""The gradient of a step where users' code has put it into the parameters' ``grad``: taken, clipped, added up."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.model import parameter_anatomy
from forgather_fn.state import TrainState
from forgather_fn.world import World


def taken(model: nn.Module, state: TrainState, samples: int, weight: float) -> Gradients:
    """Take what the parameters' ``grad`` holds as the gradient of a step; what has none is not updated."""
    params = state.params
    assert isinstance(params, Flat)
    layout = params.layout
    views: dict[str, Tensor] = {}
    seen: set[int] = set()
    for site, name in parameter_anatomy(model).sites:
        grad = site.tensor.grad
        if grad is None or name not in layout.index or id(site.tensor) in seen:
            continue
        seen.add(id(site.tensor))
        views[name] = grad if name not in views else views[name] + grad
    active = tuple(leaf.name in views for leaf in layout.leaves)
    named: Mapping[str, Tensor] = {
        leaf.name: _strided(views[leaf.name], leaf.stride) for leaf in layout.leaves if leaf.name in views
    }
    return Gradients(layout, active, named, None, samples, weight)


def has_room(model: nn.Module, state: TrainState) -> bool:
    """Tell whether all parameters with gradients are trained by a state; one that was unfrozen since may not be."""
    params = state.params
    assert isinstance(params, Flat)
    return all(
        name in params.layout.index
        for site, name in parameter_anatomy(model).sites
        if site.tensor.requires_grad and site.tensor.grad is not None
    )


def warn_of_none(model: nn.Module) -> None:
    """Warn if no parameter has a gradient: a training step may leave a batch out, and may forget the backward pass."""
    if all(p.grad is None for p in model.parameters()):
        warnings.warn(
            "no parameter has a gradient after training_step, and the step updates none. If it was not to be left out: "
            "call loss.backward() (or self.accelerator.backward) in training_step",
            stacklevel=2,
        )


def _strided(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    return grad if grad.stride() == stride else grad.new_empty_strided(grad.shape, stride).copy_(grad)


def clipped(gradients: Gradients, state: TrainState, max_norm: float) -> Gradients:
    """Clip the norm of a gradient."""
    with torch.no_grad():
        found, _ = ff.clipped(max_norm).update(gradients, None, params=state.params, step=state.step, seed=state.seed)
        assert isinstance(found, Gradients)
        return found.resolved()


def add_up(world: World, model: nn.Module, loss: Tensor, factor: float) -> Tensor:
    """Leave in the parameters' ``grad``, on every process, the sum of what all have; buffers become the first one's.

    A parameter has a gradient if it has on any process. There is one transfer for each data type, and one for the rest.

    Args:
        world: The processes.
        model: Whose parameters they are; the same on every process.
        loss: Of this process, a scalar.
        factor: What this process's gradient and loss are multiplied by.

    Returns:
        The sum of the losses, on every process.
    """
    from torch import distributed

    params = [p for p in model.parameters() if p.requires_grad]
    told = torch.tensor([float(loss) * factor, *(p.grad is not None for p in params)], dtype=torch.float64)
    with world.explained(), torch.no_grad():
        distributed.all_reduce(told, group=world.control)
        total, *counts = told.tolist()
        held = [p for p, count in zip(params, counts, strict=True) if count]
        for dtype in dict.fromkeys(p.dtype for p in held):
            _add([p for p in held if p.dtype == dtype], factor, world)
        for buffer in model.buffers():
            distributed.broadcast(buffer, group=world.group, group_src=0)
    return torch.tensor(total, dtype=loss.dtype, device=loss.device)


def _add(params: list[nn.Parameter], factor: float, world: World) -> None:
    from torch import distributed

    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([grad.reshape(-1) for grad in grads]).mul_(factor)
    distributed.all_reduce(flat, group=world.group)
    for p, piece in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
        p.grad = piece.view_as(p)
