"""Lookahead: slow weights that follow the fast ones of another optimizer."""

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.finite import BAD, applied
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_optimizer, copies
from forgather_fn.state import counter


@described
def lookahead(optimizer: Optimizer, *, steps: int = 5, alpha: float = 0.5) -> Optimizer:
    """Let another optimizer go some steps ahead, then go a part of the way behind it, and let it begin there again.

    Its slots go on as they are. All parameters are set back, also those without a gradient at that update. The slow
    weights are what is evaluated and exported.

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", arXiv 1907.08610.

    Args:
        optimizer: Of the fast weights, which the parameters of a state are.
        steps: After how many of its updates the slow weights follow.
        alpha: The part of the way, in (0, 1].

    Raises:
        ValueError: A number is out of its range, or the optimizer evaluates other parameters than it trains; or, when a
            state is made, it keeps copies of the parameters, which would not be set back.
    """
    check_optimizer("lookahead", optimizer)
    if not isinstance(steps, int) or steps < 1 or not 0 < alpha <= 1:
        raise ValueError(
            f"lookahead: steps must be an integer of at least 1, and alpha in (0, 1]; got steps={steps}, alpha={alpha}"
        )
    if optimizer.evaluated is not None:
        raise ValueError(
            f"lookahead: {optimizer!r} trains one point and evaluates another, and setting back the one would tear "
            "them apart; use it as it is"
        )

    def init(params: Flat) -> OptState:
        device, fast = params.buffers[0].device, optimizer.init(params)
        if any(copies(fast)):
            raise ValueError(
                f"lookahead: {optimizer!r} keeps copies of the parameters, from which its next update would undo that "
                "they are set back; write it the other way round: ff.optim.master_weights(ff.optim.lookahead(...))"
            )
        return {"fast": fast, "slow": params.copy(), "count": counter(0, device)}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        fast = optimizer.update(gradients, state["fast"], params, context)
        good = applied(context.found_inf)
        state["count"].add_(good.long() if isinstance(good, Tensor) else int(good))
        _follow(state["slow"], params, state["count"] % steps == 0, alpha, context.found_inf)
        return state if fast is state["fast"] else {**state, "fast": fast}

    return attrs.evolve(
        optimizer,
        init=init,
        update=update,
        separable=False,
        evaluated=lambda state, params: state["slow"],
        description="",
    )


def _follow(slow: Flat, fast: Flat, now: Tensor, alpha: float, found_inf: Tensor) -> None:
    """Let the slow weights follow where it is time, and the fast ones begin there."""
    if now.device.type == "cpu" and not torch.compiler.is_compiling():  # looking is free here
        if found_inf is BAD or not now.item():
            return
        for mine, ahead in zip(slow.buffers, fast.buffers, strict=True):
            ahead.copy_(mine.lerp_(ahead, alpha))
        return
    moves = now & (found_inf == 0)
    for mine, ahead in zip(slow.buffers, fast.buffers, strict=True):
        new = torch.where(moves, mine.lerp(ahead, alpha), mine)
        ahead.copy_(torch.where(moves, new, ahead))
        mine.copy_(new)
