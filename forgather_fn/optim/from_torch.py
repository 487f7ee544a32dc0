"""Any optimizer of torch as a pair of pure functions."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import describe, described
from forgather_fn.flat import Flat, listed
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, schedules_of
from forgather_fn.hyper import Scheduled
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext
from forgather_fn.schedules import Schedule

TorchFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

_numbers = itertools.count()


OPTIONS = "param_groups"
"""Under which name the state holds the numbers that an optimizer keeps in its parameter groups."""


@attrs.frozen(eq=False)
class Adapted:
    """A torch optimizer over leaves that are the views of one state, and the options that it began with."""

    optimizer: torch.optim.Optimizer
    leaves: Mapping[str, Tensor]
    options: tuple[Mapping[str, float], ...]


@described
def from_torch(
    factory: TorchFactory,
    *,
    weight_decay: float | Schedule | None = None,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adapt an optimizer of torch, or one written to its interface.

    Its slots become data in the state, ``{slot: {parameter: value}}``, so that they are copied, compared and saved as
    any other. It sees the parameters in groups of their own learning rate and weight decay. One look at the device a
    step decides whether it runs, since such optimizers have no other way to leave a non-finite step out.

    Args:
        factory: ``parameter groups -> optimizer``: ``lambda groups: torch.optim.RMSprop(groups, alpha=0.9)``. The
            learning rate that it is made with does not matter: the plan's schedule is set before each update.
        weight_decay: Of those parameters that decay, or a schedule of it; None leaves it to the factory, for
            all parameters.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: When a state is made: the optimizer needs a closure, is not an optimizer, or has other parameters
            than those that it was given, or other groups of them.
    """
    mine = f"from_torch {next(_numbers)}"

    def adapted(params: Flat) -> Adapted:
        if mine not in params.kept:
            params.kept[mine] = _adapt(factory, params)
        found: Adapted = params.kept[mine]
        return found

    def init(params: Flat) -> OptState:
        return _taken(adapted(params))

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        if context.found_inf.item():
            return state
        held = adapted(params)
        gradients = gradients.resolved()
        for name, leaf in held.leaves.items():
            leaf.grad = gradients.views.get(name)
        _put(held, state)
        for options, hyper in zip(held.optimizer.param_groups, params.layout.groups, strict=True):
            options["lr"] = context.learning_rate * context.valued(hyper.learning_rate)
            if isinstance(hyper.weight_decay, Scheduled):
                options["weight_decay"] = context.valued(hyper.weight_decay)
        with torch.enable_grad():
            held.optimizer.step()
        for leaf in held.leaves.values():
            leaf.grad = None
        for options, hyper in zip(held.optimizer.param_groups, params.layout.groups, strict=True):
            if isinstance(hyper.weight_decay, Scheduled):
                options["weight_decay"] = 0.0  # the schedule's, and not a part of the state
        return _taken(held)

    schedules = schedules_of(groups, weight_decay=weight_decay)
    return Optimizer(init, update, assigner(groups, weight_decay, decays), compiles=False, schedules=schedules)


def _adapt(factory: TorchFactory, params: Flat) -> Adapted:
    leaves = {name: view.detach() for name, view in params.items()}
    rows = []
    for number, hyper in enumerate(params.layout.groups):
        own = [leaves[leaf.name] for leaf in params.layout.leaves if leaf.group == number]
        row: dict[str, Any] = {"params": own}
        decay = 0.0 if isinstance(hyper.weight_decay, Scheduled) else hyper.weight_decay
        rows.append(row if decay is None else row | {"weight_decay": decay})
    optimizer = factory(rows)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"from_torch: {describe(factory)} returned {type(optimizer).__name__}, not an optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure and closure.default is inspect.Parameter.empty):
        raise ValueError(
            f"from_torch: {type(optimizer).__name__} evaluates the loss several times a step (its step needs a "
            "closure), which a pure update cannot do"
        )
    _check_parameters(factory, optimizer, rows, leaves)
    return Adapted(optimizer, leaves, _options(optimizer))


def _check_parameters(
    factory: TorchFactory,
    optimizer: torch.optim.Optimizer,
    given: Sequence[Mapping[str, Any]],
    leaves: Mapping[str, Tensor],
) -> None:
    """Make sure that the optimizer steps what it was given, and nothing else: others would not move, or alone."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    held = [id(leaf) for row in optimizer.param_groups for leaf in row["params"]]
    missing = [name for name in leaves if id(leaves[name]) not in held]
    strange = sum(one not in names for one in held)
    made = f"from_torch: {describe(factory)} made {type(optimizer).__name__}"
    if missing or strange:
        raise ValueError(
            f"{made} over other parameters than those that it was given: it lacks {listed(missing)}, and has {strange} "
            "others. Give it the parameter groups that the function takes: lambda groups: torch.optim.SGD(groups, "
            "lr=0.1); parameters that are not to be trained have requires_grad=False in the model"
        )
    sizes, found = ([len(row["params"]) for row in rows] for rows in (given, optimizer.param_groups))
    if sizes != found:
        raise ValueError(
            f"{made} with {len(found)} groups, of {found} parameters, and was given {len(sizes)}, of {sizes}: hand "
            "them on as they are, since each has a learning rate and a weight decay of its own"
        )


def _options(optimizer: torch.optim.Optimizer) -> tuple[dict[str, float], ...]:
    """Read the numbers in the parameter groups, but for the learning rate, which is the schedule's."""
    return tuple(
        {name: value for name, value in row.items() if isinstance(value, int | float) and name != "lr"}
        for row in optimizer.param_groups
    )


def _put(held: Adapted, state: OptState) -> None:
    """Make the optimizer's state what the data says, whatever it was."""
    held.optimizer.state.clear()
    for slot, values in state.items():
        if slot != OPTIONS:
            for name, value in values.items():
                held.optimizer.state[held.leaves[name]][slot] = value
    for i, (row, first) in enumerate(zip(held.optimizer.param_groups, held.options, strict=True)):
        row.update(first)
        row.update(state.get(OPTIONS, {}).get(str(i), {}))


def _taken(held: Adapted) -> OptState:
    """Read the optimizer's state out as data: slots by parameter, and options that it has changed."""
    slots: dict[str, dict[str, Any]] = {}
    for name, leaf in held.leaves.items():
        for slot, value in held.optimizer.state.get(leaf, {}).items():
            slots.setdefault(slot, {})[name] = value
    for i, (now, first) in enumerate(zip(_options(held.optimizer), held.options, strict=True)):
        changed = {name: value for name, value in now.items() if first.get(name) != value}
        if changed:
            slots.setdefault(OPTIONS, {})[str(i)] = changed
    return slots
