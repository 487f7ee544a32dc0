"""The step, from a state and a batch to the next state: what all strategies share.

``step`` counts batches consumed: the state with ``step == k`` has seen k batches, and the step that it goes through
next is called step k. Schedules and random keys read that number.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import flat as flat_storage
from forgather_fn import gradient, interrupt, tree
from forgather_fn.batch import microbatches, placed
from forgather_fn.binding import Binding
from forgather_fn.data import Batch
from forgather_fn.finite import applied, flag_on_device, flag_on_host
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.losses import Objective, named_means
from forgather_fn.mean import Mean
from forgather_fn.plan import Metrics, Plan
from forgather_fn.random import key, reseed, seeded
from forgather_fn.schedules import rate
from forgather_fn.state import Arrays, TrainState
from forgather_fn.workspace import Workspace

WANTS = frozenset({"gradient_norms"})
"""Metrics that a step computes only when asked to."""


@attrs.frozen(eq=False)
class Built:
    """A plan whose model stands on a device, ready to run.

    Attributes:
        plan: What it was built from.
        module: The real module.
        binding: Which state the module stands on.
        workspace: Where its gradients go.
        arguments: ``batch -> (positional, keyword)``: how the module is called.
        floating: The type that floating inputs are brought to, if any.
        dtype: In which scalars are computed: float64 if a parameter is, else float32.
        slots: What the optimizer keeps from the beginning.
    """

    plan: Plan
    module: nn.Module
    binding: Binding
    workspace: Workspace
    arguments: Callable[[Any], tuple[Sequence[Any], dict[str, Any]]]
    floating: torch.dtype | None
    dtype: torch.dtype
    slots: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.plan.device

    def bound(self, arrays: Arrays) -> None:
        """Make the module stand on a state's tensors.

        Raises:
            ValueError: The state is of another model or plan.
        """
        if arrays.params.kept.get("fits") is not self:
            self._check_fits(arrays)
            arrays.params.kept["fits"] = self
        if not self.binding.ensure(arrays.params, arrays.frozen, arrays.buffers):
            self.workspace.renew()

    def _check_fits(self, arrays: Arrays) -> None:
        check_layout("this state", arrays.params.layout, self.binding.layout)
        missing = sorted(self.slots - set(arrays.opt))
        sides = {
            "an average of the parameters": (arrays.ema is not None, self.plan.average is not None),
            "the number of transforms": (len(arrays.transforms), len(self.plan.transforms)),
            "optimizer slots that are missing": (len(missing), 0),
        }
        for what, (has, wants) in sides.items():
            if has != wants:
                raise ValueError(
                    f"this state was made by another plan: {what}: {has} there, {wants} here {missing or ''}"
                )

    def forward(self, data: Any) -> tuple[Any, dict[str, Mean]]:
        """Run the model and the loss on one microbatch."""
        args, kwargs = self.arguments(data)
        with self.autocast():
            outputs = self.module(*args, **kwargs)
            return outputs, named_means(self.plan.loss(outputs, data))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which forward and loss run."""
        if self.plan.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def place(self, data: Any) -> Any:
        """Bring a batch's data to the device and the precision of the plan."""
        return placed(data, self.device, self.floating)


def check_layout(what: str, given: Layout, expected: Layout) -> None:
    """Make sure that flat storage is laid out as this program's.

    Raises:
        ValueError: It is of another model, or grouped otherwise; the first difference is shown.
    """
    if given is expected or (given.leaves, given.groups) == (expected.leaves, expected.groups):
        return
    names = set(given.index) ^ set(expected.index)
    odd = flat_storage.listed(sorted(names)) if names else "in shapes, data types or parameter groups"
    raise ValueError(f"{what} is of another model or plan than this program: they differ in {odd}")


def take_gradients(built: Built, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
    """Run forward and backward over the microbatches of a batch; leave the state as it is, also on failure.

    Returns:
        The mean gradient, which aliases the workspace; the buffers that forward passes leave; the means of the loss.
    """
    arrays = state.read()
    built.bound(arrays)
    data = built.place(batch.data)
    parts = (
        [data]
        if built.plan.microbatches == 1
        else microbatches(attrs.evolve(batch, data=data), built.plan.microbatches)
    )
    before = arrays.buffers.copy() if built.binding.buffer_slots else None
    buffers = arrays.buffers
    built.workspace.clear()
    try:
        with seeded(key(state.seed, state.step, 0, "forward"), built.device):
            means, mean_taken = _accumulate(built, state, parts)
        built.binding.check_buffers()
        if before is not None:
            buffers = built.binding.read_buffers()
    except BaseException:
        built.workspace.clear()
        raise
    finally:
        if before is not None:
            arrays.buffers.assign(before)
            built.binding.bind_buffers(arrays.buffers)
    weight = means["loss"].weight
    gradients = built.workspace.collect(batch.samples, weight)
    if not mean_taken:
        gradients = gradients.divided(_inverse(weight, built.dtype, built.device).reciprocal())
    return gradients, buffers, means


def _accumulate(built: Built, state: TrainState, parts: Sequence[Any]) -> tuple[dict[str, Mean], bool]:
    """Add up losses and gradients over microbatches, each under its own key.

    Where the weight of the whole step is known before the backward pass, gradients are of the mean as they arise, so
    that gradient hooks see them so; otherwise they are of the sum, and False is returned.
    """
    weight = _known_weight(built.plan, parts)
    totals: dict[str, Mean] = {}
    for i, part in enumerate(parts):
        if i:
            interrupt.check()
            reseed(key(state.seed, state.step, i, "forward"), built.device)
        _, means = built.forward(part)
        objective = means["loss"]
        total = objective.total
        if not total.requires_grad:
            raise ValueError(_NOT_DIFFERENTIABLE)
        if len(parts) == 1:
            weight = objective.weight
        share = None if weight is None else _inverse(weight, total.dtype, built.device)
        torch.autograd.backward(total, share)
        detached = {name: mean.detach() for name, mean in means.items()}
        totals = {name: totals[name] + mean for name, mean in detached.items()} if i else detached
    return totals, weight is not None


_NOT_DIFFERENTIABLE = (
    "the objective's total does not depend on any trainable parameter: it was detached, computed under "
    "torch.no_grad(), or every parameter is frozen"
)


def _known_weight(plan: Plan, parts: Sequence[Any]) -> Tensor | float | None:
    """Weigh all microbatches before the first forward pass, where the loss can."""
    if len(parts) == 1 or not isinstance(plan.loss, Objective):
        return None
    return sum((plan.loss.weight(part) for part in parts[1:]), plan.loss.weight(parts[0]))


def _inverse(weight: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Divide one by a weight; nothing to weigh gives zero, so that a batch without labels moves nothing."""
    if isinstance(weight, Tensor) and weight.device.type == "cpu":
        weight = weight.item()  # looking is free here, and one call is faster than three
    if not isinstance(weight, Tensor):
        return torch.scalar_tensor(1.0 / weight if weight else 0.0, dtype=dtype, device=device)
    return weight.to(dtype).reciprocal().nan_to_num_(posinf=0.0)


def advance(
    built: Built,
    state: TrainState,
    gradients: Gradients,
    buffers: Flat | None,
    means: Mapping[str, Mean],
    wants: frozenset[str] = frozenset(),
) -> tuple[TrainState, Metrics]:
    """Apply a gradient: transforms, the look at whether all is finite, the optimizer, averages, buffers, counters.

    The state is consumed when nothing can fail any more: after the transforms, and on a CPU after the look.
    """
    plan, arrays = built.plan, state.read()
    check_layout("this gradient", gradients.layout, built.binding.layout)
    learning_rate = rate(plan.schedule, state.step)
    with torch.no_grad():
        extra = _wanted(gradients, wants) if wants else {}
        gradients, transforms = _transformed(plan, gradients, arrays, state)
        gradients = gradients.measured()
        norm = gradients.norm()
        probe = norm + means["loss"].total if "loss" in means else norm
        flags = flag_on_host if built.device.type == "cpu" else flag_on_device
        found_inf, nonfinite = flags(plan.on_nonfinite, probe, arrays.nonfinite, state.step)
        arrays = state.consume(f"step {state.step}")
        arrays = _updated(plan, arrays, gradients, transforms, learning_rate, found_inf)
        arrays = _counted(plan, arrays, gradients, buffers, found_inf)
        if nonfinite is not arrays.nonfinite:
            arrays.nonfinite.copy_(nonfinite)
    if arrays.buffers is not built.binding.buffers:
        built.binding.bind_buffers(arrays.buffers)
    metrics = {**means, "grad_norm": norm, **gradients.reports, "learning_rate": learning_rate, **extra}
    following = TrainState(
        step=state.step + 1,
        samples=state.samples + gradients.samples,
        seed=state.seed,
        data=state.data,
        batch_size=state.batch_size,
        arrays=arrays,
    )
    return following, metrics


def _wanted(gradients: Gradients, wants: frozenset[str]) -> dict[str, Any]:
    if wants - WANTS:
        raise ValueError(f"a step was asked for {sorted(wants - WANTS)}; it can give {sorted(WANTS)}")
    return {f"grad_norm/{name}": norm for name, norm in gradient.norms(gradients).items()}


def _transformed(
    plan: Plan, gradients: Gradients, arrays: Arrays, state: TrainState
) -> tuple[Gradients, tuple[Any, ...]]:
    states = []
    for transform, held in zip(plan.transforms, arrays.transforms, strict=True):
        gradients, held = gradient.apply(
            transform, gradients, held, params=arrays.params, step=state.step, seed=state.seed
        )
        states.append(held)
    return gradients, tuple(states)


def _updated(
    plan: Plan,
    arrays: Arrays,
    gradients: Gradients,
    transforms: tuple[Any, ...],
    learning_rate: float,
    found_inf: Tensor,
) -> Arrays:
    opt = plan.optimizer.update(gradients, arrays.opt, arrays.params, learning_rate=learning_rate, found_inf=found_inf)
    good = applied(found_inf)
    arrays.updates.add_(good.long() if isinstance(good, Tensor) else int(good))
    ema = arrays.ema
    if plan.average is not None:
        assert ema is not None
        ema = plan.average.update(ema, arrays.params, good=good, updates=arrays.updates)
    if any(held is not None for held in transforms):
        transforms = tuple(
            tree.gated(found_inf, old, new) for old, new in zip(arrays.transforms, transforms, strict=True)
        )
    if opt is arrays.opt and ema is arrays.ema and not any(held is not None for held in transforms):
        return arrays
    return attrs.evolve(arrays, opt=opt, ema=ema, transforms=transforms)


def _counted(plan: Plan, arrays: Arrays, gradients: Gradients, buffers: Flat | None, found_inf: Tensor) -> Arrays:
    weight = gradients.weight
    arrays.tokens.add_(weight.long() if isinstance(weight, Tensor) else int(weight))
    if plan.on_nonfinite == "skip":
        arrays.skipped.add_(found_inf.long())
    if buffers is None or buffers is arrays.buffers:
        return arrays
    if buffers.layout is not arrays.buffers.layout:
        # A buffer changed its shape: its place in the storage is new, and whether to take it is asked of the device.
        return arrays if found_inf.item() else attrs.evolve(arrays, buffers=buffers.copy())
    for held, new in zip(arrays.buffers.buffers, buffers.buffers, strict=True):
        held.copy_(torch.where(found_inf > 0, held, new))
    return arrays
