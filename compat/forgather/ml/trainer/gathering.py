"""What the parameters' ``grad`` holds, added up over processes, where users' code has put it there."""

import torch
from torch import Tensor, nn

from forgather_fn.world import World


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
