"""The module of one process: the model whole, and then freed of other stages; or never whole at all."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from forgather_fn.losses import Arguments
from forgather_fn.meta import initialise_modules, on_meta
from forgather_fn.model import buffer_slots, initialise_by_name, parameter_anatomy
from forgather_fn.pipeline.cuts import Assignment, Cut, SplitError, registered
from forgather_fn.pipeline.freeing import free, freed, is_freed
from forgather_fn.pipeline.inference import agreed
from forgather_fn.pipeline.line import Line
from forgather_fn.pipeline.machine import first_sample
from forgather_fn.pipeline.probe import probe
from forgather_fn.plan import Plan

_assignments: "weakref.WeakKeyDictionary[nn.Module, Assignment]" = weakref.WeakKeyDictionary()
"""Of modules that were freed of stages: how the whole was assigned."""


def assignment_of(module: nn.Module, cuts: Sequence[Cut]) -> Assignment:
    """Assign the tensors of a module to the stages that cuts make of it.

    Raises:
        SplitError: The module has been freed of stages that other cuts make.
    """
    known = _assignments.get(module)
    if known is None:
        return registered(module, cuts)
    if known.cuts != tuple(cuts):
        raise SplitError(
            f"split_spec: this model was cut at {', '.join(map(str, known.cuts))} before, and what belongs to other "
            "processes is gone from it; cut it there again, or build it anew"
        )
    return known


def assigned_by(module: nn.Module, cuts: Sequence[Cut], arguments: Arguments, example: Any) -> Assignment:
    """Assign the tensors of a module to stages by a run on an example, where registration does not tell.

    Args:
        module: Whole; on the meta device, it is run without memory for its parameters.
        cuts: In order.
        arguments: How it is called.
        example: A batch, of which one sample is used.
    """
    guess = assignment_of(module, cuts)
    if is_freed(module):
        return guess
    run = _hollow(module) if on_meta(module) else module
    args, kwargs = arguments(first_sample(example))
    used = probe(run, cuts, lambda: run(*args, **kwargs)).assignment
    params = {name: used.params.get(name) or stages for name, stages in guess.params.items()}
    buffers = {name: used.buffers.get(name) or stages for name, stages in guess.buffers.items()}
    return Assignment(guess.cuts, params, buffers, guess.places)


def _hollow(module: nn.Module) -> nn.Module:
    """Copy a module from the meta device to one that can be run: zeros in the memory of one element each."""
    copied = copy.deepcopy(module)
    free(copied, lambda name: True, torch.device("cpu"))
    for slot in buffer_slots(copied):
        if slot.tensor is not None:
            slot.held[slot.attribute] = torch.zeros((), dtype=slot.tensor.dtype).expand(slot.tensor.shape)
    return copied


def stage_prepared(plan: Plan, seed: int, module: nn.Module, line: Line, assignment: Assignment, dtype: Any) -> None:
    """Give a module the values of this process's stages, and no memory for those of others.

    A module that has values keeps them, and all processes those of the first one. One that was built on the meta
    device, or is initialised by name, never has memory for stages of others.

    Args:
        plan: The recipe.
        seed: Of the run.
        module: As the plan's model gives it; changed in place. One that has been freed before stays so.
        line: The processes.
        assignment: Which stages have which tensors.
        dtype: To which floating tensors are brought, or None.
    """
    own = frozenset(line.own)
    _assignments[module] = assignment

    def foreign(name: str) -> bool:
        return not own & assignment.params[name]

    if is_freed(module):
        if plan.init == "by_name":
            initialise_by_name(module, seed, _initialised(module))
        return
    if plan.init == "by_name" and on_meta(module):
        mixed = _mixed(module, assignment, own)
        free(module, lambda name: foreign(name) and name not in mixed, plan.device)
        initialise_modules(module, _initialised(module), seed, plan.device)
        _fill_buffers(module, plan.device)
    elif plan.init == "by_name":
        initialise_by_name(module, seed)
    anatomy = parameter_anatomy(module)
    module.to(device=plan.device, dtype=dtype)
    anatomy.retie()
    if plan.init == "as_built":
        tensors = {name: p.detach() for name, p in parameter_anatomy(module).params.items()}
        agreed({**tensors, **dict(module.named_buffers())}, line.world)
    free(module, foreign, torch.device(plan.device))


def _initialised(module: nn.Module) -> set[str]:
    """Name the modules that are initialised here: those that have a parameter that was not freed, or never had one."""
    return {
        name
        for name, child in module.named_modules()
        if any(p is not None for p in child._parameters.values()) or not freed(child)
    }


def _fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Give the buffers of modules of other stages memory, so that what runs in every stage can run."""
    for slot in buffer_slots(module):
        if slot.tensor is not None and slot.tensor.is_meta:
            slot.held[slot.attribute] = torch.zeros_like(slot.tensor, device=device)


def _mixed(module: nn.Module, assignment: Assignment, own: frozenset[int]) -> frozenset[str]:
    """Name the parameters of other stages that lie in one module with a parameter of this process's.

    A module is initialised whole, so they get memory until it is.
    """
    found: set[str] = set()
    for prefix, child in module.named_modules():
        places = [f"{prefix}.{name}" if prefix else name for name, p in child._parameters.items() if p is not None]
        names = [assignment.places[place] for place in places]
        if any(own & assignment.params[name] for name in names):
            found.update(names)
    return frozenset(found)
