"""How the states of a program hold parameters, and how a model is built and gives a state its first values."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import average, evaluation, flat, scaling
from forgather_fn.binding import attach, bound, unbind
from forgather_fn.built import Built
from forgather_fn.flat import Flat, Hyper, Layout, layout_of
from forgather_fn.losses import Objective
from forgather_fn.meta import initialise_from_meta, on_meta
from forgather_fn.model import (
    Anatomy,
    buffer_names,
    buffer_slots,
    build,
    call_arguments,
    enter_training,
    initialise_by_name,
    parameter_anatomy,
    surrounded,
)
from forgather_fn.plan import Plan
from forgather_fn.program import Whole, itself
from forgather_fn.reducers.base import begun
from forgather_fn.shards import Rows
from forgather_fn.state import Arrays, Params, TrainState, counter
from forgather_fn.workspace import workspace


class Agree(Protocol):
    """Make the first states of all processes the same one."""

    def __call__(self, layout: Layout, tensors: Sequence[Tensor], /) -> None:
        """Give these tensors the values that they have on the first process.

        Raises:
            ValueError: The processes have other models or plans.
        """
        ...


class First(Protocol):
    """Copy the values of a module into storage of a state's own."""

    def __call__(self, built: Built, module: nn.Module, /) -> tuple[Flat, Mapping[str, Tensor], Flat]:
        """Give the trained parameters, the others, and the buffers: the same on all processes."""
        ...


@attrs.frozen(eq=False)
class Storage:
    """How the states of a program hold parameters: whole, or this process's shards of them.

    Attributes:
        prepare: ``(plan, seed) -> module``: builds the module, or takes it, and gives it its first values.
        build: Makes it ready to run.
        first: Makes the tensors of a first state.
        export: Takes the model out.
        whole: Brings a state together, to be written.
        rows: Which rows of a parameter are read from a checkpoint; None for all.
        pace: Keeps processes in step in an evaluation.
    """

    prepare: Callable[[Plan, int], nn.Module]
    build: Callable[[Plan, nn.Module], Built]
    first: First
    export: Callable[[Built, TrainState, Params], nn.Module]
    whole: Whole = itself
    rows: Rows | None = None
    pace: evaluation.Pace = evaluation.UNPACED


def prepared(plan: Plan, seed: int) -> nn.Module:
    """Build the module and give it its first values, data types, and device."""
    module = build(plan.model, seed)
    if plan.init == "by_name" and on_meta(module):
        initialise_from_meta(module, seed, plan.device)
    elif plan.init == "by_name":
        unbind(module)  # so that its new values are not drawn into the storage of a state
        initialise_by_name(module, seed)
    anatomy = parameter_anatomy(module)
    module.to(device=plan.device, dtype=floating(plan))
    anatomy.retie()
    return module


def floating(plan: Plan) -> torch.dtype | None:
    """Give the data type that floating tensors are brought to, if any."""
    return {"float32": torch.float32, "float64": torch.float64}.get(plan.precision)


def _build(plan: Plan, module: nn.Module) -> Built:
    if bound(module):
        unbind(module)  # so that frozen parameters do not lie in the storage of another program's state
    enter_training(module)
    binding = attach(module, trained_hypers(plan, module, parameter_anatomy(module)))
    check_can_be_scaled(plan, binding.layout)
    by_leaf = [[site.tensor for site, name in binding.trainable if name == leaf.name] for leaf in binding.layout.leaves]
    return Built(
        plan=plan,
        module=module,
        binding=binding,
        workspace=workspace(
            binding.layout.widened() if plan.accumulate == "float32" else binding.layout,
            [list(dict.fromkeys(ps)) for ps in by_leaf],
            plan.device,
            plan.viewed_elements if plan.update == "after_backward" else 0,
        ),
        call=_call(plan, module),
        arguments=call_arguments(module, plan.loss),
        floating=floating(plan),
        dtype=torch.float64 if torch.float64 in binding.layout.dtypes else torch.float32,
    )


def trained_hypers(plan: Plan, module: nn.Module, anatomy: Anatomy) -> Mapping[str, Hyper]:
    """Give the hyperparameters of the parameters that ask for a gradient.

    Raises:
        ValueError: None does, or all are in a frozen group.
    """
    asked = {name: p for name, p in anatomy.params.items() if p.requires_grad}
    if not asked:
        raise ValueError(
            f"{type(module).__name__} has no parameter that asks for a gradient: there is nothing to train"
        )
    hypers = plan.optimizer.groups(asked)
    if all(hyper.frozen for hyper in hypers.values()):
        raise ValueError("every parameter is in a frozen group: there is nothing to train")
    return hypers


def check_can_be_scaled(plan: Plan, layout: Layout) -> None:
    """Make sure that gradients that are scaled for float16 can be scaled back."""
    half = [leaf.name for leaf in layout.leaves if leaf.dtype == torch.float16]
    if plan.precision == "float16" and half:
        raise ValueError(
            f'Plan: precision="float16" computes in float16 on parameters of float32, and {flat.listed(half)} '
            "are in float16: what is lost in them no loss scale brings back. Convert the model: model.float()"
        )


def _call(plan: Plan, module: nn.Module) -> Callable[..., Any]:
    """Give the module as it is called outside of a compiled step; in evaluation, compiled as well."""
    call = torch.compile(module, backend=plan.backend) if plan.compile else module
    if not (isinstance(plan.loss, Objective) and plan.loss.around):
        return call

    def within(*args: Any, **kwargs: Any) -> Any:
        with surrounded(module, plan.loss):
            return call(*args, **kwargs)

    return within


def held_whole(agree: Agree) -> Storage:
    """Hold every parameter whole, on every process."""

    def first(built: Built, module: nn.Module) -> tuple[Flat, Mapping[str, Tensor], Flat]:
        binding = built.binding
        values: dict[str, Tensor] = {name: p.detach() for name, p in parameter_anatomy(module).params.items()}
        params = flat.filled(binding.layout, {name: values[name] for name in binding.layout.index}, built.device)
        frozen = {name: values[name] for _, name in binding.still}
        stored = stored_buffers(module, built.device)
        agree(binding.layout, [*params.buffers, *frozen.values(), *stored.buffers])
        return params, frozen, stored

    return Storage(prepare=prepared, build=_build, first=first, export=_export)


def stored_buffers(module: nn.Module, device: torch.device) -> Flat:
    """Copy the buffers of a module, tied ones once."""
    slots = buffer_slots(module)
    names = buffer_names(slots)
    buffers = {s.name: s.tensor.detach() for s in slots if s.tensor is not None and names[s.name] == s.name}
    return flat.filled(layout_of(buffers), buffers, device)


def first_state(built: Built, module: nn.Module, seed: int, storage: Storage) -> TrainState:
    """Copy the module's values into storage of the state's own, and bind the program's module to it."""
    plan, binding, device = built.plan, built.binding, built.device
    params, frozen, stored = storage.first(built, module)
    if plan.average is not None and storage.rows is not None and params.layout.widened() is not params.layout:
        raise ValueError(
            f"{plan.average!r} is kept in float32, and shards of parameters in half precision have no place for that: "
            'use float32 parameters with Plan(precision="bfloat16")'
        )
    transforms = tuple(transform.init(params) for transform in plan.transforms)
    arrays = Arrays(
        updates=counter(0, device),
        skipped=counter(0, device),
        tokens=counter(0, device),
        nonfinite=counter(-1, device),
        params=params,
        frozen=frozen,
        buffers=stored,
        opt=plan.optimizer.init(params),
        transforms=transforms,
        ema=None if plan.average is None else average.begun(params),
        controls=begun(plan.controls),
        loss_scale=scaling.initial(device) if plan.precision == "float16" else {},
    )
    binding.release()
    binding.bind(arrays.params, arrays.frozen, arrays.buffers)
    return TrainState(step=0, samples=0, seed=seed, arrays=arrays)


def _export(built: Built, state: TrainState, params: Params) -> nn.Module:
    arrays = state.read()
    built.bound(arrays)
    used = evaluation.chosen(built.plan, arrays, params)
    if used is not arrays.params:
        built.binding.bind(used, arrays.frozen, arrays.buffers)
    try:
        exported = copy.deepcopy(built.module)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(built.module).__name__} cannot be copied ({error}); take its weights instead: "
            "program.module().state_dict()"
        ) from error
    finally:
        built.bound(arrays)
    built.binding.restore_ties(exported)
    unbind(exported)
    return exported
