"""The laws of one step, all at once."""

from typing import Any

from forgather_fn import tree
from forgather_fn.plan import Plan
from forgather_fn.state import difference
from forgather_fn.testing.accumulation import check_accumulation, outside
from forgather_fn.testing.compare import TOLERANCE, changed, plain, snapshot
from forgather_fn.testing.donation import check_donation
from forgather_fn.testing.evaluation import check_microbatches
from forgather_fn.testing.nonfinite import check_nonfinite
from forgather_fn.testing.purity import check_purity
from forgather_fn.testing.subject import in_float64, sizes, subject


def check_step(plan: Plan, batch: Any, *, tolerance: float = TOLERANCE, seed: int = 0) -> tuple[str, ...]:
    """Check every law that one batch can tell of.

    These are purity, donation, composition (``step`` is ``gradients`` and ``update``, to the bit, and ``gradients``
    changes nothing), that gradients of nan change nothing where they are left out, evaluation on parts of the batch,
    and accumulation, where the model is inside that law: without batch statistics and dropout. A plan that updates in
    the backward pass can neither leave an update out nor accumulate.

    Args:
        plan: What is checked. A module in it is copied.
        batch: As ``program.step`` takes it; at least 3 samples.
        tolerance: Of evaluation and accumulation, which are checked in float64.
        seed: Of the first state.

    Returns:
        The names of the laws that were checked, so that it can be asserted that one was not left out.

    Raises:
        AssertionError: It names the leaf, the step and the sizes.
        ValueError: The batch is too small.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_step(plan, (torch.ones(4, 2), torch.zeros(4, 1)))
        ('purity', 'donation', 'composition', 'nonfinite', 'evaluation', 'accumulation')
    """
    check_purity(plan, batch, seed=seed)
    check_donation(plan, batch, seed=seed)
    check_composition(plan, batch, steps=3, seed=seed)
    checked: tuple[str, ...] = ("purity", "donation", "composition")
    if plan.update != "in_backward":
        check_nonfinite(plan, batch, seed=seed)
        checked = (*checked, "nonfinite")
    check_microbatches(plan, batch, tolerance=tolerance, seed=seed)
    with in_float64():
        reason = outside(plan, batch, seed)
    checked = (*checked, "evaluation")
    if reason or plan.update == "in_backward":
        return checked
    check_accumulation(plan, batch, tolerance=tolerance, seed=seed)
    return (*checked, "accumulation")


def check_composition(plan: Plan, batch: Any, *, steps: int, seed: int) -> None:
    """Check that ``step`` is ``gradients`` and ``update`` composed, to the bit, over several steps."""
    made = subject(plan, seed)
    program, state = made.program, made.first
    for _ in range(steps):
        where = f"composition: step {state.step} ({sizes(plan, batch)})"
        kept = snapshot(state.as_tree())
        gradients, buffers, means = program.gradients(state, batch)
        found = changed(kept, state.as_tree())
        if found:
            raise AssertionError(f"{where}: program.gradients changed the state: {found}")
        held = snapshot(gradients)
        composed, reports = program.update(state.copy(), gradients, buffers)
        found = changed(held, gradients)
        if found:
            raise AssertionError(f"{where}: program.update changed the gradient that it was given: {found}")
        state, metrics = program.step(state, batch)
        found = difference(state, composed) or tree.difference(plain(metrics), plain({**means, **reports}))
        if found:
            raise AssertionError(f"{where}: step (first) and update of gradients (second) differ in bits: {found}")
