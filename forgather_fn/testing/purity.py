"""Law 1: a step is a function of the state and the batch."""

from typing import Any

from forgather_fn import tree
from forgather_fn.batch import as_batch
from forgather_fn.plan import Plan
from forgather_fn.state import TrainState, difference
from forgather_fn.testing.compare import changed, plain, snapshot
from forgather_fn.testing.subject import Subject, sizes, subject
from forgather_fn.testing.surroundings import drawing_nothing, elsewhere


def check_purity(plan: Plan, batch: Any, *, steps: int = 2, seed: int = 0) -> None:
    """Check that the same call gives the same bits, and that with ``donate=False`` it changes none of its inputs.

    Every step is taken three times: again by the same program, and by another one made of the same plan. The
    repetitions find other numbers in the global random generators, another ``RANK`` in the environment, and another
    date. What must not change is the state, the batch, and the global generators of torch, numpy and Python.

    Args:
        plan: Whose steps are checked. A module in it is copied.
        batch: As ``program.step`` takes it.
        steps: How many steps are checked, one after the other.
        seed: Of the first state.

    Raises:
        AssertionError: It names the leaf, the step and the sizes.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_purity(plan, (torch.ones(4, 2), torch.zeros(4, 1)))
    """
    one = subject(plan, seed, donate=False)
    with elsewhere():
        other = subject(plan, seed, donate=False)
    found = difference(one.first, other.first)
    if found:
        raise AssertionError(
            f"purity: two programs of one plan start from different states with seed={seed}: {found}. A model's "
            "factory must draw its values from torch's default generator, which is seeded for it."
        )
    states = one.first, other.first
    for _ in range(steps):
        states = _check_call(plan, one, other, states, batch)


def _check_call(
    plan: Plan, one: Subject, other: Subject, states: tuple[TrainState, TrainState], batch: Any
) -> tuple[TrainState, TrainState]:
    """Take one step three times, and give the state that follows, once for each program."""
    state, others = states
    where = f"step {state.step} ({sizes(plan, batch)}, donate=False)"
    kept, data = snapshot(state.as_tree()), snapshot(as_batch(batch).data)
    with drawing_nothing(f"purity: {where}"):
        following, metrics = one.program.step(state, batch)
    if state.consumed:
        raise AssertionError(f"purity: {where} consumed its state")
    for name, before, now in (("state", kept, state.as_tree()), ("batch", data, as_batch(batch).data)):
        found = changed(before, now)
        if found:
            raise AssertionError(f"purity: {where} changed the {name} that it was given: {found}")
    with elsewhere():
        again, metrics_again = one.program.step(state, batch)
        elsewhere_state, metrics_elsewhere = other.program.step(others, batch)
    for who, result, reports in (
        ("a second time", again, metrics_again),
        ("by another program", elsewhere_state, metrics_elsewhere),
    ):
        found = difference(following, result) or tree.difference(plain(metrics), plain(reports))
        if found:
            raise AssertionError(f"purity: {where}, taken {who}, gave other bits: {found}")
    return following, elsewhere_state
