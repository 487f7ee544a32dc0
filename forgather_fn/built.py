"""A plan whose model stands on a device, ready to run."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import flat as flat_storage
from forgather_fn.batch import microbatches, placed
from forgather_fn.binding import Binding
from forgather_fn.data import Batch
from forgather_fn.flat import Layout
from forgather_fn.gradient import Gradients
from forgather_fn.losses import Objective, named_means
from forgather_fn.mean import Mean
from forgather_fn.plan import Plan
from forgather_fn.state import Arrays
from forgather_fn.workspace import Workspace

T = TypeVar("T")

_LOWERED: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@attrs.frozen(eq=False)
class Built:
    """A plan whose model stands on a device, ready to run.

    Attributes:
        plan: What it was built from.
        module: The real module.
        binding: Which state the module stands on.
        workspace: Where its gradients go.
        call: The module, or what was compiled of it alone.
        arguments: ``batch -> (positional, keyword)``: how the module is called.
        floating: The type that floating inputs are brought to, if any.
        dtype: In which scalars are computed: float64 if a parameter is, else float32.
        slots: What the optimizer keeps from the beginning.
    """

    plan: Plan
    module: nn.Module
    binding: Binding
    workspace: Workspace
    call: Callable[..., Any]
    arguments: Callable[[Any], tuple[Sequence[Any], dict[str, Any]]]
    floating: torch.dtype | None
    dtype: torch.dtype
    slots: frozenset[str] = frozenset()

    @property
    def summing(self) -> Layout:
        """Where gradients are added: the layout of the parameters, or that in a wider type."""
        return self.workspace.layout

    @property
    def viewed(self) -> bool:
        """Whether gradients lie in flat buffers."""
        return self.binding.layout.elements <= self.plan.viewed_elements

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.plan.device

    def bound(self, arrays: Arrays) -> None:
        """Make the module stand on a state's tensors.

        Raises:
            ValueError: The state is of another model or plan.
        """
        self.check(arrays)
        if not self.binding.ensure(arrays.params, arrays.frozen, arrays.buffers):
            self.workspace.renew()

    def check(self, arrays: Arrays) -> None:
        """Make sure that a state is one of this model and plan.

        Raises:
            ValueError: It is not.
        """
        if arrays.params.kept.get("fits") is not self:
            self._check_fits(arrays)
            arrays.params.kept["fits"] = self

    def _check_fits(self, arrays: Arrays) -> None:
        here, there = (flat_storage.listed(sorted(names)) for names in (self.slots, arrays.opt))
        slots = f"the optimizer's slots: {there} there, {here} here" if here != there else ""
        check_layout("this state", arrays.params.layout, self.binding.layout, slots)
        missing = sorted(self.slots - set(arrays.opt))
        sides = {
            "an average of the parameters": (arrays.ema is not None, self.plan.average is not None),
            "the number of transforms": (len(arrays.transforms), len(self.plan.transforms)),
            "a loss scale": (bool(arrays.loss_scale), self.plan.precision == "float16"),
            "optimizer slots that are missing": (len(missing), 0),
        }
        for what, (has, wants) in sides.items():
            if has != wants:
                raise ValueError(
                    f"this state was made by another plan: {what}: {has} there, {wants} here {missing or ''}"
                )

    def forward(self, data: Any, weight: Tensor | float | None = None) -> dict[str, Mean]:
        """Run the model and the loss on one microbatch, whose weight is given where it has been found already.

        The outputs are not given, so that nobody holds them through the backward pass: the logits of a large
        vocabulary are the largest tensor of all.
        """
        return self.seen(data, self._means if weight is None else functools.partial(self._means, weight=weight))

    def _means(self, outputs: Any, data: Any, weight: Tensor | float | None = None) -> dict[str, Mean]:
        loss = self.plan.loss
        if weight is None:
            return named_means(loss(outputs, data))
        assert isinstance(loss, Objective)
        return named_means(loss.weighed(outputs, data, weight))

    def seen(self, data: Any, look: Callable[[Any, Any], T]) -> T:
        """Run the model on one microbatch, and give what a function of outputs and batch sees."""
        args, kwargs = self.arguments(data)
        if self.lowered is None:
            return look(self.call(*args, **kwargs), data)
        with self.autocast():
            return look(self.call(*args, **kwargs), data)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which forward and loss run."""
        lowered = self.lowered
        return contextlib.nullcontext() if lowered is None else torch.autocast(self.device.type, dtype=lowered)

    @property
    def lowered(self) -> torch.dtype | None:
        """The type that autocast lowers to, if any."""
        return _LOWERED.get(self.plan.precision)

    def place(self, data: Any) -> Any:
        """Bring a batch's data to the device and the precision of the plan."""
        return placed(data, self.device, self.floating)

    def parts(self, batch: Batch) -> list[Any]:
        """Bring a batch to the device, cut into the plan's microbatches.

        Raises:
            ValueError: As :func:`~forgather_fn.batch.microbatches`.
        """
        data, count = self.place(batch.data), self.plan.microbatches
        return [data] if count == 1 else microbatches(attrs.evolve(batch, data=data), count)


def own_gradients(layout: Layout, tensors: Mapping[str, Tensor], batch: Batch | None) -> Gradients:
    """Take gradients that the user has computed: the mean over a batch, by name.

    A parameter without an entry is left untouched by the update.

    Raises:
        ValueError: A name or shape is not the model's, or it is not said which batch they are of.
    """
    if batch is None:
        raise ValueError(
            "update: say which batch these gradients are of, as batch=...; it moves the position in the data"
        )
    if set(tensors) - set(layout.index):
        raise ValueError(
            f"update: there is no trained parameter {flat_storage.listed(sorted(set(tensors) - set(layout.index)))}; "
            f"the parameters are {flat_storage.listed(list(layout.index))}"
        )
    views = {}
    for leaf in layout.leaves:
        if leaf.name in tensors:
            given = tensors[leaf.name]
            if given.shape != leaf.shape:
                raise ValueError(
                    f"update: the gradient of {leaf.name} has the shape {tuple(given.shape)}, and the parameter "
                    f"{leaf.shape}"
                )
            views[leaf.name] = given.new_empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype).copy_(given.detach())
    active = tuple(leaf.name in views for leaf in layout.leaves)
    return Gradients(layout, active, views, None, batch.samples, batch.samples, cursor=batch.cursor)


def check_layout(what: str, given: Layout, expected: Layout, slots: str = "") -> None:
    """Make sure that flat storage is laid out as this program's.

    Args:
        what: That it is of.
        given: Its layout.
        expected: The program's.
        slots: How the optimizer's slots differ, which explains groups that do.

    Raises:
        ValueError: It is of another model, or grouped otherwise; the first difference is shown.
    """
    if given is expected or (given.leaves, given.groups) == (expected.leaves, expected.groups):
        return
    kinds, own = ({leaf.name: (leaf.shape, leaf.dtype) for leaf in layout.leaves} for layout in (given, expected))
    odd = sorted(given.index.keys() ^ expected.index.keys())
    if odd:
        found = flat_storage.listed(odd)
    elif unlike := sorted(name for name in kinds if kinds[name] != own[name]):
        found = f"shapes or data types: of {flat_storage.listed(unlike)}"
    elif slots:
        found = f"{slots}; old.convert(state, new, without={{'optimizer'}}) makes a state of another program"
    else:
        found = "the parameter groups: the learning rates, weight decays or parts of the optimizer"
    raise ValueError(f"{what} is of another model or plan than this program: they differ in {found}")
