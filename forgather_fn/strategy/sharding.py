"""The storage of states that lie in shards: how it is made, and how a model is brought together from it."""

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import evaluation, shards
from forgather_fn.binding import Binding, bound, unbind
from forgather_fn.blank import blank_of, filled_in
from forgather_fn.built import Built
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat, Layout, filled, zeros
from forgather_fn.fsdp import Fsdp, Ready, cut, module_names, units_of
from forgather_fn.losses import Objective
from forgather_fn.meta import initialise_modules, on_meta, separable
from forgather_fn.model import (
    anatomy_of,
    buffer_names,
    buffer_slots,
    build,
    call_arguments,
    check_apart,
    class_of,
    enter_training,
    parameter_anatomy,
)
from forgather_fn.plan import Plan
from forgather_fn.reduction import Reduction
from forgather_fn.sharded import added, on_shards, shard_workspace
from forgather_fn.shards import Shards, shards_of
from forgather_fn.share import Share
from forgather_fn.state import Arrays, Ownership, Params, TrainState
from forgather_fn.strategy.storage import (
    Agree,
    Storage,
    check_can_be_scaled,
    floating,
    prepared,
    stored_buffers,
    trained_hypers,
)
from forgather_fn.world import World

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Sharding:
    """How one program cuts its model; its parts are known when the model is built.

    Attributes:
        world: The processes.
        agree: Makes whole tensors the same on all of them.
        patterns: Which modules are gathered one at a time; None for the members of module lists.
        fsdp: The model, cut.
        blank: A copy of the model without values, for the models that are exported; or why there is none.
        sites: Each place of a parameter in the model, with its name.
        drawn: Gives some modules of the model that was prepared last their values; None if it has them.
    """

    world: World
    agree: Agree
    patterns: Sequence[str] | None
    fsdp: Fsdp | None = None
    blank: nn.Module | Exception | None = None
    sites: tuple[tuple[str, str], ...] = ()
    drawn: Ready | None = None

    def storage(self) -> Storage:
        """Give what a program asks of its storage."""
        return Storage(
            prepare=self.prepare,
            build=self.build,
            first=self.first,
            export=self.export,
            whole=self.whole,
            rows=lambda length, /: shards.rows(length, self.world.rank, self.world.size),
            pace=evaluation.PACED,
        )

    def execution(self, built: Built, share: Share) -> Execution:
        """Give how the steps are run."""
        return on_shards(built, self.cut_model, self.world, share)

    @property
    def cut_model(self) -> Fsdp:
        """The model, which is cut by now."""
        assert self.fsdp is not None
        return self.fsdp

    def prepare(self, plan: Plan, seed: int) -> nn.Module:
        """Build the module; one that was given, and is cut already, stays as it is.

        One on the meta device is left there, if its units can be initialised one at a time; otherwise it is whole.

        Raises:
            ValueError: It is cut already, and is to be initialised anew; or somebody else has cut it.
        """
        given = plan.model
        if isinstance(given, nn.Module) and class_of(given) is not type(given):
            if self.fsdp is None or id(self.fsdp.module) != id(given):
                raise ValueError(
                    "sharded: the model is cut by fully_shard already; give it as it was, or a function that builds it"
                )
            if plan.init == "by_name":
                raise ValueError(
                    'sharded: init="by_name" on a module that this program has cut; give a function that builds it'
                )
            return given
        module = build(plan.model, seed)
        self.drawn = None
        if plan.init == "by_name" and on_meta(module):
            parts = module_names([*units_of(module, self.patterns), ("", module)])
            if separable(module, parts):
                self.drawn = functools.partial(_draw, module, seed, plan.device, floating(plan))
                return module
            logger.info("the model is built whole before it is cut: units initialise, or share, what is not their own")
        return prepared(attrs.evolve(plan, model=module), seed)

    def build(self, plan: Plan, module: nn.Module) -> Built:
        """Cut a module."""
        if bound(module):
            unbind(module)
        enter_training(module)
        slots, names = buffer_slots(module), buffer_names(buffer_slots(module))
        layout = self._cut(plan, module)
        check_can_be_scaled(plan, layout)
        binding = Binding(
            module=module,
            layout=layout,
            trainable=(),
            still=(),
            buffer_slots=slots,
            place=self.cut_model.place,
            tied_buffers=names,
        )
        return Built(
            plan=plan,
            module=module,
            binding=binding,
            workspace=shard_workspace(layout, self.cut_model, plan.device, added(self.world)),
            call=module,
            arguments=call_arguments(module, plan.loss),
            floating=floating(plan),
            dtype=torch.float64 if torch.float64 in layout.dtypes else torch.float32,
        )

    def _cut(self, plan: Plan, module: nn.Module) -> Layout:
        """Cut the parameters. No name here may hold whole ones on when it returns."""
        anatomy = anatomy_of(module)
        if self.drawn is None:
            check_apart(buffer_slots(module), anatomy)
        hypers = trained_hypers(plan, module, anatomy)
        trained = {name: p for name, p in anatomy.params.items() if name in hypers and not hypers[name].frozen}
        still = {name: p for name, p in anatomy.params.items() if name not in trained}
        dtype = floating(plan)
        trained_shards = shards_of(_typed(trained, dtype), self.world, {name: hypers[name] for name in trained})
        still_shards = shards_of(_typed(still, dtype), self.world)
        self._agree(trained_shards.whole, anatomy.params, module)
        self.sites = tuple((site.name, name) for site, name in anatomy.sites)
        self.blank = blank_of(module)
        for parameter in still.values():
            parameter.requires_grad_(False)
        del anatomy, trained, still
        ready = self.drawn or (lambda names: None)
        self.fsdp = cut(module, self.patterns, trained_shards, still_shards, self.world, plan.device, ready)
        return trained_shards.layout

    def _agree(self, layout: Layout, params: Mapping[str, Tensor], module: nn.Module) -> None:
        tensors = [tensor.detach() for tensor in (*params.values(), *module.buffers()) if not tensor.is_meta]
        self.agree(layout, tensors)  # what is on the meta device will be drawn under the same keys everywhere

    def first(self, built: Built, module: nn.Module) -> tuple[Flat, Mapping[str, Tensor], Flat]:
        """Copy this process's shards of a module's values: of the one that is cut, or of another that is whole."""
        fsdp = self.cut_model
        if module is fsdp.module:
            values = fsdp.shards()
            params, frozen = (
                filled(own.layout, {name: values[name] for name in own.layout.index}, built.device)
                for own in (fsdp.trained, fsdp.still)
            )
        elif self.drawn is not None:
            params, frozen = self._cut_as_drawn(built, module, self.drawn)
        else:
            whole = {name: p.detach() for name, p in parameter_anatomy(module).params.items()}
            self._agree(fsdp.trained.whole, whole, module)
            params, frozen = (own.cut(whole, built.device) for own in (fsdp.trained, fsdp.still))
        return params, frozen, stored_buffers(module, built.device)

    def _cut_as_drawn(self, built: Built, module: nn.Module, ready: Ready) -> tuple[Flat, Flat]:
        """Draw the values of one part after the other, keep this process's rows, and let go of the rest."""
        fsdp = self.cut_model
        params, frozen = (zeros(own.layout, built.device) for own in (fsdp.trained, fsdp.still))
        for part in module_names([*units_of(module, self.patterns), ("", module)]):
            ready(part)
            for place, name in self.sites:
                prefix, _, attribute = place.rpartition(".")
                if prefix in part:
                    held = module.get_submodule(prefix)._parameters
                    drawn, own, flat = held[attribute], fsdp.trained, params
                    if name not in params:
                        own, flat = fsdp.still, frozen
                    assert drawn is not None
                    flat[name].copy_(own.mine(name, drawn.detach()))
                    held[attribute] = None
        return params, frozen

    def whole(self, state: TrainState, /) -> TrainState | None:
        """Bring a state together on the first process's host; see :class:`~forgather_fn.program.Whole`."""
        self.world.begin("the gathering of a state")
        fsdp, arrays = self.cut_model, state.read()

        def brought(leaf: Flat | Tensor) -> Any:
            for own in (fsdp.trained, fsdp.still):
                if isinstance(leaf, Flat) and leaf.layout is own.layout:
                    return own.collected(leaf)
            return leaf.copy() if isinstance(leaf, Flat) else leaf.detach().clone()

        frozen = _as_flat(fsdp.still, arrays.frozen)
        fields = {field.name: getattr(arrays, field.name) for field in attrs.fields(Arrays)} | {"frozen": frozen}
        found = {name: shards.mapped(value, brought) for name, value in fields.items()}
        return attrs.evolve(state, arrays=Arrays(**found), ownership=Ownership()) if self.world.main else None

    def export(self, built: Built, state: TrainState, params: Params) -> nn.Module:
        """Make a whole model on the host of every process. This is collective.

        Raises:
            ValueError: The model could not be copied before it was cut, or the plan keeps no average.
        """
        fsdp, arrays = self.cut_model, state.read()
        built.bound(arrays)
        if not isinstance(self.blank, nn.Module):
            raise ValueError(
                f"{class_of(built.module).__name__} cannot be copied ({self.blank}); save a checkpoint instead"
            ) from self.blank
        trained = evaluation.chosen(built.plan, arrays, params)
        frozen = _as_flat(fsdp.still, arrays.frozen)
        values = {name: fsdp.trained.gathered(trained, name).cpu() for name in trained}
        values |= {name: fsdp.still.gathered(frozen, name).cpu() for name in frozen}
        buffers = {
            place: arrays.buffers[name].detach().to("cpu", copy=True)
            for place, name in built.binding.buffer_places(arrays.buffers).items()
        }
        return filled_in(copy.deepcopy(self.blank), self.sites, values, buffers)


def _as_flat(own: Shards, frozen: Mapping[str, Tensor]) -> Flat:
    """Store frozen shards as they were in a first state; those of a checkpoint come one by one."""
    if isinstance(frozen, Flat):
        return frozen
    device = next((tensor.device for tensor in frozen.values()), torch.device("cpu"))
    return filled(own.layout, frozen, device)


def _typed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Give tensors without values, of the data types that those that are to be drawn will have."""
    return {
        name: torch.empty_like(t, device="meta", dtype=dtype if dtype and t.is_floating_point() else t.dtype)
        for name, t in tensors.items()
    }


def _draw(
    module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype | None, names: frozenset[str], /
) -> None:
    """Give some modules of a model on the meta device their values, in the data type of the plan."""
    initialise_modules(module, names, seed, device)
    for name, child in module.named_modules():
        if name in names and dtype is not None:
            for held in (child._parameters, child._buffers):
                for tensor in held.values():
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)


def check_shards(plan: Plan, reduction: Reduction, overlap_bytes: int | None) -> None:
    """Make sure that a plan can be carried out on shards.

    Raises:
        ValueError: Something in it needs whole tensors, or what the whole step needs is not to be had.
    """
    parts: list[Any] = [plan.optimizer, *plan.transforms]
    for part in parts:
        if not part.elementwise:
            raise ValueError(
                f"sharded: {part!r} is not known to work element by element, or by the norm of the whole gradient, and "
                "a process has some rows of each tensor only. Use ff.adamw, ff.adam, ff.sgd or ff.optim.lion, and "
                "ff.clipped; one of your own that does says so: Optimizer(..., elementwise=True), "
                "Transform(..., elementwise=True)"
            )
    refused = {
        'accumulate="float32"': (plan.accumulate == "float32", "gradients are added up by torch, unit by unit"),
        "compile": (plan.compile is not False, "units are gathered by hooks, between which nothing can be one graph"),
        "overlap_bytes": (overlap_bytes is not None, "each unit's gradient is sent while the next is computed"),
        repr(plan.loss): (
            isinstance(plan.loss, Objective) and plan.loss.around is not None,
            "it uses the head's weight when the model has run, and let go of it",
        ),
        'reduction="tree"': (reduction == "tree", "gradients are added up unit by unit, by torch's reduce-scatter"),
    }
    for what, (given, reason) in refused.items():
        if given:
            raise ValueError(f"sharded: cannot be with {what}: {reason}")
