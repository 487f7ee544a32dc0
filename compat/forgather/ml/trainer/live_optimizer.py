"""The optimizer: a torch optimizer over the live parameters, whose update the functional core makes.

Users see, write and save an ordinary ``torch.optim`` object. Where it is one of torch's own Adam, AdamW or SGD, its
options are read at every step and its slots are views of the state's storage, so that the fused update over flat
storage is used; any other is called as it is, with the gradients in the parameters' ``grad``.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import Hyper, Scheduled
from forgather_fn.model import parameter_anatomy
from forgather_fn.optim import Optimizer, OptState, UpdateContext

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD

_SAME: dict[Any, dict[str, Any]] = {
    ADAM: {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False},
    ADAMW: {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False},
    SGD: {"maximize": False, "differentiable": False, "dampening": 0},
}
"""Options that must have these values for the fused update to be torch's own."""

_ALIKE = {ADAM: ("betas", "eps"), ADAMW: ("betas", "eps"), SGD: ("momentum", "nesterov")}
"""Options that must be the same in all groups."""

_SLOTS = {ADAM: ("exp_avg", "exp_avg_sq"), ADAMW: ("exp_avg", "exp_avg_sq"), SGD: ("momentum",)}


def is_fusible(optimizer: Any) -> bool:
    """Tell whether the core's fused update does what this optimizer's step would do."""
    kind = type(optimizer)
    if kind not in _SAME or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if not _steps_as_its_class(optimizer):
        return False
    groups = optimizer.param_groups
    if any(group.get(name, value) != value for group in groups for name, value in _SAME[kind].items()):
        return False
    if kind is ADAM and any(group.get("decoupled_weight_decay") for group in groups):
        return False
    alike = [tuple(group[name] for name in _ALIKE[kind]) for group in groups]
    numbers = all(isinstance(option, bool | int | float) for row in alike for option in _flattened(row))
    return numbers and len(set(alike)) == 1


def _steps_as_its_class(optimizer: Any) -> bool:
    """Tell whether nobody has put another ``step`` into this optimizer; schedulers put theirs around the class's."""
    step = vars(optimizer).get("step")
    step = getattr(step, "__wrapped__", step) if getattr(step, "_wrapped_by_lr_sched", False) else step
    return step is None or getattr(step, "__func__", step) is type(optimizer).step


def _flattened(row: tuple[Any, ...]) -> Iterator[Any]:
    for item in row:
        yield from item if isinstance(item, tuple) else (item,)


@attrs.define(eq=False)
class Adopted:
    """A torch optimizer whose updates the core makes.

    Attributes:
        optimizer: What users hold.
        names: The first name of each parameter of the module.
        optimizers: The core's, by the options that they were made with.
        shown: The state's slots that the optimizer shows now, if any.
    """

    optimizer: Any
    names: Mapping[nn.Parameter, str]
    optimizers: dict[tuple[Any, ...], Optimizer] = attrs.field(factory=dict)
    shown: OptState | None = None
    _dirty: bool = False

    def as_optimizer(self) -> Optimizer:
        """Make the optimizer of a plan."""
        kind = type(self.optimizer).__name__
        return Optimizer(self.init, self.update, self.groups, description=kind, separable=True, compiles=False)

    def groups(self, params: Mapping[str, Tensor]) -> Mapping[str, Hyper]:
        """Give each parameter group storage of its own; what it has no group for is kept, and never changed.

        Their numbers have names here, under which :meth:`update` gives those that the groups have then.
        """
        number = {
            self.names[p]: i
            for i, group in enumerate(self.optimizer.param_groups)
            for p in group["params"]
            if p in self.names
        }
        apart = Hyper(learning_rate=0.0, weight_decay=0.0)  # such parameters take part in the norm, and stay
        return {
            name: Hyper(Scheduled(f"learning_rate/{number[name]}"), Scheduled(f"weight_decay/{number[name]}"))
            if name in number
            else apart
            for name in params
        }

    def init(self, params: Flat) -> OptState:
        """Make slots, with the values that the optimizer's state has already."""
        state = self._core().init(params)
        self._fill(state, params)
        return state

    def update(self, gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        """Make the update that the optimizer's own step would make, with its options as they are now."""
        if self._dirty or (self.shown is not None and not self.optimizer.state):
            self._fill(state, params)
        numbers = {}
        for i, group in enumerate(self.optimizer.param_groups):
            numbers[f"learning_rate/{i}"] = float(group["lr"])
            numbers[f"weight_decay/{i}"] = float(group.get("weight_decay", 0.0))
        context = UpdateContext(1.0, context.found_inf, numbers, context.step, context.seed)
        found = self._core().update(gradients, state, params, context)
        self.optimizer._opt_called = True  # what schedulers look for before they warn of a missing step
        if self.shown is not found or len(self.optimizer.state) < len(self.names):
            self._show(found, params)
        return found

    def _core(self) -> Optimizer:
        row = self.optimizer.param_groups[0]
        key = tuple(row[name] for name in _ALIKE[type(self.optimizer)])
        if key not in self.optimizers:
            makers: dict[Any, Callable[..., Optimizer]] = {ADAM: ff.adam, ADAMW: ff.adamw, SGD: ff.sgd}
            make = makers[type(self.optimizer)]
            self.optimizers[key] = make(**dict(zip(_ALIKE[type(self.optimizer)], key, strict=True)))
        return self.optimizers[key]

    def _show(self, state: OptState, params: Flat) -> None:
        """Make the optimizer's state the views of the slots, for parameters that have been updated."""
        if type(self.optimizer) is SGD:
            if "momentum" in state:
                for name, p in self._owned(params):
                    self.optimizer.state[p]["momentum_buffer"] = state["momentum"][name]
            self.shown = state
            return
        counts = state["count"].unbind()
        updated = state["count"].tolist()
        for name, p in self._owned(params):
            i = params.layout.index[name]
            if updated[i]:
                row = self.optimizer.state[p]
                row["step"], row["exp_avg"], row["exp_avg_sq"] = (
                    counts[i],
                    state["exp_avg"][name],
                    state["exp_avg_sq"][name],
                )
        self.shown = state

    def _fill(self, state: OptState, params: Flat) -> None:
        """Take the values of the slots from the optimizer's state; zero where it has none."""
        self._dirty = False
        adam = type(self.optimizer) is not SGD
        with torch.no_grad():
            for name, p in self._owned(params):
                row = self.optimizer.state.get(p, {})
                for slot in (s for s in _SLOTS[type(self.optimizer)] if s in state):
                    _take(state[slot][name], row.get("momentum_buffer" if slot == "momentum" else slot))
                if adam:
                    step = row.get("step", 0.0)
                    state["count"][params.layout.index[name]] = float(step)
        params.kept.pop("counted", None)
        self.shown = None

    def _owned(self, params: Flat) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                name = self.names.get(p)
                if name in params.layout.index:
                    yield str(name), p

    def changed(self) -> None:
        """Note that the optimizer's state was loaded, so that the slots take its values before the next update."""
        self._dirty = True

    def is_whole(self, state: OptState) -> bool:
        """Tell whether the state has the slots that the options ask for, and the update is still the optimizer's."""
        has_slots = set(_SLOTS[type(self.optimizer)]) <= set(state) or (
            type(self.optimizer) is SGD and not self.optimizer.param_groups[0]["momentum"]
        )
        return has_slots and is_fusible(self.optimizer)


def _take(slot: Tensor, value: Tensor | None) -> None:
    if value is None:
        slot.zero_()
    elif value.data_ptr() != slot.data_ptr():
        slot.copy_(value)


@attrs.define(eq=False)
class Called:
    """A torch optimizer of any kind, called as it is: parameters are the state's memory, gradients lie in ``grad``."""

    optimizer: Any
    names: Mapping[nn.Parameter, str]

    def as_optimizer(self) -> Optimizer:
        """Make the optimizer of a plan."""
        name = type(self.optimizer).__name__
        return Optimizer(lambda params: {}, self.update, self.groups, description=name, compiles=False)

    def groups(self, params: Mapping[str, Tensor]) -> Mapping[str, Hyper]:
        """Tell nothing apart: the optimizer has groups of its own."""
        return {name: Hyper() for name in params}

    def update(self, gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        """Call the optimizer's step."""
        del params
        if context.found_inf.item():
            return state
        gradients = gradients.resolved()
        for p, name in self.names.items():
            p.grad = gradients.views.get(name)
        with torch.enable_grad():
            self.optimizer.step()
        # Schedulers may look at gradients, so those of the model stay until the next step; others are nobody else's.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p not in self.names:
                    p.grad = None
        return state

    def changed(self) -> None:
        """Its state is its own."""

    def is_whole(self, state: OptState) -> bool:
        """Its slots are its own."""
        return True


def first_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Give the first name of each parameter, tied ones under one."""
    return {site.tensor: name for site, name in parameter_anatomy(model).sites}


def adopted(optimizer: Any, model: nn.Module) -> Adopted | Called:
    """Make a torch optimizer ready for a plan."""
    names = first_names(model)
    if not is_fusible(optimizer):
        return Called(optimizer, names)
    held = Adopted(optimizer, names)
    if not getattr(optimizer, "_forgather_watch", None):
        watch = optimizer._forgather_watch = {"adopted": held}
        optimizer.register_load_state_dict_post_hook(lambda optimizer: watch["adopted"].changed())
        optimizer.register_state_dict_post_hook(lambda optimizer, state: _own_storage(state))
    optimizer._forgather_watch["adopted"] = held
    return held


def _own_storage(state: dict[str, Any]) -> dict[str, Any]:
    """Give the slots of a ``state_dict`` storage of their own: saving a view writes all that it is a view of."""
    rows = {number: {slot: _apart(value) for slot, value in row.items()} for number, row in state["state"].items()}
    return {**state, "state": rows}


def _apart(value: Any) -> Any:
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone()
    return value
