"""Law 2: donation changes speed only, a consumed state refuses, and a failed step consumes nothing."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
from torch import Tensor

from forgather_fn import tree
from forgather_fn.plan import Plan
from forgather_fn.program import Program
from forgather_fn.state import Arrays, ConsumedStateError, TrainState, difference
from forgather_fn.testing.compare import changed, plain, snapshot
from forgather_fn.testing.failing import PLANTS, PlantedError, Trap, gradients_held
from forgather_fn.testing.subject import Subject, sizes, subject
from forgather_fn.testing.surroundings import drawing_nothing


def check_donation(plan: Plan, batch: Any, *, steps: int = 3, seed: int = 0) -> None:
    """Check that updating in place gives the same bits as copying first, and loses nothing when a step fails.

    With ``donate=True`` a step consumes its state: every field of it must refuse to be read. A failure in a fetch, at
    the end of the forward pass, in the loss, at the end of the backward pass, or in a transform must consume nothing:
    the state stays readable and as it was, the module's parameters and buffers too, ``.grad`` holds nothing new, and
    the step, taken again, gives the bits that it would have given. (Not so a failure in the backward pass of a plan
    whose ``update`` is ``"in_backward"``, which has made a part of the update by then.)

    Args:
        plan: Whose steps are checked. A module in it is copied.
        batch: As ``program.step`` takes it.
        steps: Over how many steps the bits are compared.
        seed: Of the first state.

    Raises:
        AssertionError: It names the leaf, the step and the sizes.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_donation(plan, (torch.ones(4, 2), torch.zeros(4, 1)))
    """
    owning, copying = subject(plan, seed, donate=True), subject(plan, seed, donate=False)
    given, kept = owning.first, copying.first
    for _ in range(steps):
        following, metrics = owning.program.step(given, batch)
        reference, expected = copying.program.step(kept, batch)
        found = difference(reference, following) or tree.difference(plain(expected), plain(metrics))
        if found:
            raise AssertionError(
                f"donation: step {given.step} ({sizes(plan, batch)}) gave other bits with donate=True (second) than "
                f"with donate=False (first): {found}"
            )
        _check_refusal(owning.program, given, batch)
        given, kept = following, reference
    donating = attrs.evolve(plan, donate=True)
    _check_fetch(donating, batch, seed)
    for place in PLANTS:
        if plan.update == "in_backward" and place in ("backward", "a transform"):
            continue  # parameters have been updated by then, which cannot be taken back; and there are no transforms
        _check_failure(donating, batch, seed, place)


def _check_refusal(program: Program, state: TrainState, batch: Any) -> None:
    """Try whatever would read a consumed state."""
    reads: dict[str, Callable[[], Any]] = {
        f"its field {field.name!r}": partial(getattr, state, field.name) for field in attrs.fields(Arrays)
    }
    reads |= {
        "copy()": state.copy,
        "as_tree()": state.as_tree,
        "program.step": lambda: program.step(state, batch),
        "program.gradients": lambda: program.gradients(state, batch),
        "program.export": lambda: program.export(state),
    }
    for name, read in reads.items():
        try:
            read()
        except ConsumedStateError:
            continue
        raise AssertionError(f"donation: the state that step {state.step} consumed could still be read by {name}")


def _check_fetch(plan: Plan, batch: Any, seed: int) -> None:
    """Fail between two steps."""
    made = subject(plan, seed)

    def failing() -> Iterator[Any]:
        yield batch
        raise PlantedError

    ticks = iter(made.program.steps(made.first, failing()))
    state = next(ticks).state
    kept = snapshot(state.as_tree())
    where = f"step {state.step} ({sizes(plan, batch)}), whose fetch failed,"
    _expect_failure(where, lambda: next(ticks))
    _check_untouched(where, made, state, kept)


def _check_failure(plan: Plan, batch: Any, seed: int, place: str) -> None:
    """Fail in the second step, when slots, buffers and averages are no longer what they began with."""
    trap = Trap()
    made = PLANTS[place](plan, seed, trap)
    state, _ = made.program.step(made.first, batch)
    trap.passed = 0
    expected, reports = made.program.step(state.copy(), batch)
    assert trap.passed, f"no step passes {place}"
    where = f"step {state.step} ({sizes(plan, batch)}), which failed in {place},"
    kept, held = snapshot(state.as_tree()), gradients_held(made.module)
    modes = [module.training for module in made.module.modules()]
    trap.arm()
    with drawing_nothing(f"donation: {where}"):
        _expect_failure(where, lambda: made.program.step(state, batch))
    trap.disarm()
    _check_untouched(where, made, state, kept)
    left = gradients_held(made.module)
    found = next((name for name in left if name not in held or tree.difference(held[name], left[name])), None)
    if found:
        raise AssertionError(f"donation: {where} left a gradient in {found}.grad")
    if modes != [module.training for module in made.module.modules()]:
        raise AssertionError(f"donation: {where} left a module in another mode (training or evaluation)")
    again, metrics = made.program.step(state, batch)
    found = difference(expected, again) or tree.difference(plain(reports), plain(metrics))
    if found:
        raise AssertionError(f"donation: {where} gave other bits when it was taken again: {found}")


def _expect_failure(where: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except PlantedError:
        return
    raise AssertionError(f"donation: {where} swallowed the exception")


def _check_untouched(where: str, made: Subject, state: TrainState, kept: dict[str, Any]) -> None:
    """Compare a state, and the module that is bound to it, with what was there before a failure."""
    if state.consumed:
        raise AssertionError(f"donation: {where} consumed its state")
    found = changed(kept, state.as_tree())
    if found:
        raise AssertionError(f"donation: {where} changed its state: {found}")
    module = made.module
    for stands, held in (
        ({**state.params, **state.frozen}, dict(module.named_parameters(remove_duplicate=False))),
        (state.buffers, dict(module.named_buffers(remove_duplicate=False))),
    ):
        found = _module_difference(stands, held)
        if found:
            raise AssertionError(f"donation: {where} left the module unlike its state (first: the state): {found}")


def _module_difference(stands: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> str | None:
    """Compare what a module holds with a state, which has tied tensors under their first name only."""
    memory = {held[name].data_ptr() for name in stands if name in held}
    named = {name: tensor for name, tensor in held.items() if name in stands or tensor.data_ptr() not in memory}
    return tree.difference(dict(stands), named)
