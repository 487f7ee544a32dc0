"""A step that is not finite leaves everything as it was."""

from typing import Any, Final

import torch

from forgather_fn.plan import Plan
from forgather_fn.testing.compare import changed, snapshot
from forgather_fn.testing.subject import sizes, subject

KEPT: Final = ("params", "opt", "transforms", "ema", "buffers")


def check_nonfinite(plan: Plan, batch: Any, *, seed: int = 0) -> None:
    """Check that gradients of nan change nothing but the counts, where such steps are left out.

    An update learns of them by a flag on the device, ``context.found_inf``: to look would be to wait. An optimizer, or
    a transform with a state, that does not heed it spoils the run at the first nan; and no other law tells.

    Args:
        plan: Whose optimizer, transforms and average are checked, with ``on_nonfinite="skip"``.
        batch: As ``program.step`` takes it.
        seed: Of the first state.

    Raises:
        AssertionError: It names the leaf.
        ValueError: The plan cannot leave steps out: it updates in the backward pass.

    Example:
        >>> import forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_nonfinite(plan, (torch.ones(4, 2), torch.zeros(4, 1)))
    """
    made = subject(plan, seed, on_nonfinite="skip")
    program = made.program
    state, _ = program.step(made.first, batch)  # so that slots hold something
    gradients, buffers, _ = program.gradients(state, batch)
    spoilt = gradients.replaced(
        {name: torch.full_like(one, torch.nan) for name, one in gradients.items()}, by="a check"
    )
    before = snapshot({name: getattr(state, name) for name in KEPT})
    skipped = int(state.skipped)
    after, _ = program.update(state, spoilt, buffers)
    where = f"nonfinite: step {after.step - 1} ({sizes(plan, batch)})"
    found = changed(before, {name: getattr(after, name) for name in KEPT})
    if found:
        raise AssertionError(
            f"{where}: gradients of nan changed the state: {found}. Where context.found_inf is 1 instead of 0, nothing "
            "must change: torch.where(found_inf > 0, old, new)"
        )
    if int(after.skipped) != skipped + 1:
        raise AssertionError(
            f"{where}: the step was left out, and state.skipped went from {skipped} to {after.skipped}"
        )
