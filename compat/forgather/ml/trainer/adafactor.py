"""Adafactor, as transformers has it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Optimizer):
    """Adam without a first moment, and with a second one that is stored as the sums of rows and columns.

    Source: Shazeer and Stern, arXiv 1804.04235; the arithmetic is that of ``transformers.optimization.Adafactor``, bit
    for bit, so that states can be exchanged. (That of ``torch.optim.Adafactor`` is another.)

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate; None where ``relative_step`` finds it.
        eps: What is added to squared gradients, and the least scale of a parameter.
        clip_threshold: Updates whose root mean square is above it are scaled down to it.
        decay_rate: The second moment decays by ``1 - step ** decay_rate``.
        beta1: The decay of a first moment, if there is to be one.
        weight_decay: As in AdamW.
        scale_parameter: Whether the rate is multiplied by the parameter's root mean square.
        relative_step: Whether the rate is found from the number of the step.
        warmup_init: Whether that rate rises at first.

    Raises:
        ValueError: A rate is given and to be found, or is to rise and not to be found.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(f"lr={lr!r}: Cannot combine manual `lr` and `relative_step=True` options")
        if warmup_init and not relative_step:
            raise ValueError("`warmup_init=True` requires `relative_step=True`")
        names = ("lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay")
        numbers = (lr, eps, clip_threshold, decay_rate, beta1, weight_decay)
        switches = {"scale_parameter": scale_parameter, "relative_step": relative_step, "warmup_init": warmup_init}
        super().__init__(params, dict(zip(names, numbers, strict=True)) | switches)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Called first, with gradients enabled, if given.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)
        return loss


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    gradient = _wide(parameter.grad)
    if gradient.is_sparse:
        raise RuntimeError("Adafactor does not support sparse gradients.")
    if not state:
        state.update(_slots(gradient, group["beta1"] is not None))
    values = _wide(parameter)
    state["step"] += 1
    state["RMS"] = _rms(values)
    lr = _rate(state, group)
    update = _direction(gradient, state, 1.0 - state["step"] ** group["decay_rate"], group["eps"][0])
    update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(lr)
    if group["beta1"] is not None:
        update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
    if group["weight_decay"] != 0:
        values.add_(values, alpha=-group["weight_decay"] * lr)
    values.add_(-update)
    if values is not parameter:
        parameter.copy_(values)


def _slots(gradient: Tensor, first_moment: bool) -> dict[str, Any]:
    slots: dict[str, Any] = {"step": 0}
    if first_moment:
        slots["exp_avg"] = torch.zeros_like(gradient)
    if gradient.dim() >= 2:
        slots["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[:-1])
        slots["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:])
    else:
        slots["exp_avg_sq"] = torch.zeros_like(gradient)
    return slots | {"RMS": 0}


def _direction(gradient: Tensor, state: dict[str, Any], beta2: float, least: float) -> Tensor:
    """Divide the gradient by the root of its second moment, which is updated."""
    square = gradient**2 + least
    if "exp_avg_sq" in state:
        state["exp_avg_sq"].mul_(beta2).add_(square, alpha=1.0 - beta2)
        return torch.rsqrt(state["exp_avg_sq"]).mul_(gradient)
    rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    rows.mul_(beta2).add_(square.mean(dim=-1), alpha=1.0 - beta2)
    columns.mul_(beta2).add_(square.mean(dim=-2), alpha=1.0 - beta2)
    row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(row, columns.unsqueeze(-2).rsqrt()).mul_(gradient)


def _rate(state: dict[str, Any], group: dict[str, Any]) -> Any:
    rate = group["lr"]
    if group["relative_step"]:
        most = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
        rate = min(most, state["step"] ** -0.5)
    return max(group["eps"][1], state["RMS"]) * rate if group["scale_parameter"] else 1.0 * rate


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _rms(tensor: Tensor) -> Tensor:
    root: Tensor = tensor.norm(2) / (tensor.numel() ** 0.5)
    return root
