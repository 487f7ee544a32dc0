"""A program to be checked, on a module of its own."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import nn

from forgather_fn.batch import as_batch
from forgather_fn.model import ModelFactory, build, parameter_anatomy
from forgather_fn.plan import Plan
from forgather_fn.program import Program
from forgather_fn.state import TrainState
from forgather_fn.strategy.single import single


@attrs.frozen(eq=False)
class Subject:
    """A program of a plan, the module that it is bound to, and its first state."""

    program: Program
    module: nn.Module
    first: TrainState


def subject(plan: Plan, seed: int, **changes: Any) -> Subject:
    """Make a program of a plan without touching the plan's module.

    Args:
        plan: As the user gave it.
        seed: Of the first state.
        changes: Fields of the plan that are other for this check.
    """
    module = own_module(plan.model, seed)
    program = single(attrs.evolve(plan, model=module, **changes))
    return Subject(program, module, program.init(seed))


def own_module(model: nn.Module | ModelFactory, seed: int) -> nn.Module:
    """Copy a module with its ties, or build one from its factory as a program does.

    Raises:
        ValueError: The module cannot be copied.
    """
    if not isinstance(model, nn.Module):
        return build(model, seed)
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}), and a check must not change the module that it is "
            "given. Make the plan with a function that builds the model: Plan(model=lambda: Model(...))"
        ) from error
    tie(copied, ties(model))
    return copied


def ties(module: nn.Module) -> Mapping[str, str]:
    """Name, for every parameter of a module, the first one that shares its memory."""
    return {site.name: name for site, name in parameter_anatomy(module).sites}


def tie(module: nn.Module, first: Mapping[str, str]) -> None:
    """Let parameters share memory as named: a copy or a conversion keeps ties by object, but not those by storage."""
    params = dict(module.named_parameters(remove_duplicate=False))
    for name, leader in first.items():
        params[name].data = params[leader].data


def sizes(plan: Plan, batch: Any) -> str:
    """Say what a step was given, for a message."""
    return f"a batch of {as_batch(batch).samples} samples, microbatches={plan.microbatches}"


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Explain a failure of the user's code that comes of the precision in which a law is checked."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "This law is checked in float64, with the model's floating parameters, buffers and inputs converted. "
            "Tensors that forward makes should take their data type from those: torch.zeros(n, dtype=x.dtype)"
        )
        raise
