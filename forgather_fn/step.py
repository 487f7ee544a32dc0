"""The step, from a state and a batch to the next state: what all strategies share.

``step`` counts batches consumed: the state with ``step == k`` has seen k batches, and the step that it goes through
next is called step k. Schedules and random keys read that number.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from forgather_fn import interrupt, scaling, tree, wanted
from forgather_fn.batch import outline
from forgather_fn.built import Built, check_layout
from forgather_fn.data import Batch
from forgather_fn.execution import Advance, Execution, RunPasses
from forgather_fn.finite import FINE, Flag, Verdict, applied, flag_on_device, flag_on_host
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.losses import Objective
from forgather_fn.mean import Mean
from forgather_fn.optim.base import OptState, Rates, UpdateContext, rates_at
from forgather_fn.plan import Plan
from forgather_fn.program import Metrics
from forgather_fn.random import key, reseed, seeded
from forgather_fn.state import Arrays, TrainState
from forgather_fn.transforms.base import apply_all
from forgather_fn.wide import wide

T = TypeVar("T")


def eager(built: Built) -> Execution:
    """Run the steps of a program as they stand."""
    return composed(built, functools.partial(take_gradients, built), functools.partial(advance, built))


def composed(built: Built, first: RunPasses, second: Advance) -> Execution:
    """Make whole steps of two halves; one that fails between them leaves no gradient behind."""

    def step(state: TrainState, batch: Batch, wants: frozenset[str]) -> tuple[TrainState, Metrics]:
        gradients, buffers, means = first(state, batch)
        try:
            result = second(state, gradients, buffers, means, wants)
        except BaseException:
            built.workspace.clear()
            raise
        built.workspace.release()
        return result

    return Execution(step, first, second)


def take_gradients(built: Built, state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
    """Run forward and backward over the microbatches of a batch; leave the state as it is, also on failure.

    Returns:
        The mean gradient, which aliases the workspace; the buffers that forward passes leave; the means of the loss.
    """
    arrays = state.read()
    built.bound(arrays)
    parts = built.parts(batch)
    try:
        (means, mean_taken), buffers = passed(built, state, lambda: _accumulate(built, state, parts))
    except (RuntimeError, TypeError, IndexError) as error:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in built.binding.layout.dtypes)
        error.add_note(
            f"The batch was {outline(built.place(batch.data))}; the parameters are {kinds}, "
            f"precision={built.plan.precision!r}."
        )
        raise
    weight = means["loss"].weight
    gradients = built.workspace.collect(batch.samples, weight)
    return divided(built, arrays, gradients, weight=None if mean_taken else weight), buffers, means


def passed(built: Built, state: TrainState, passes: Callable[[], T]) -> tuple[T, Flat]:
    """Run forward and backward passes under the step's key, and leave the state as it is, also on failure.

    Returns:
        What the passes gave, and the buffers as they leave them; gradients lie in the workspace.
    """
    arrays = state.read()
    before = arrays.buffers.copy() if built.binding.buffer_slots else None
    buffers = arrays.buffers
    built.workspace.clear()
    try:
        with seeded(key(state.seed, state.step, 0, "forward"), built.device):
            result = passes()
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
    return result, buffers


def divided(built: Built, arrays: Arrays, gradients: Gradients, *, weight: Tensor | float | None) -> Gradients:
    """Divide a gradient by the weight of what it is a sum over, if it is not a mean already, and by the loss scale.

    A sum that was taken in a wider type than that of the parameters is rounded to it before.
    """
    gradients = gradients.narrowed(built.binding.layout)
    if weight is not None:
        gradients = gradients.divided(inverse(weight, built.dtype, built.device).reciprocal())
    return gradients.divided(arrays.loss_scale["scale"]) if arrays.loss_scale else gradients


def _accumulate(built: Built, state: TrainState, parts: Sequence[Any]) -> tuple[dict[str, Mean], bool]:
    """Add up losses and gradients over microbatches, each under its own key.

    Where the weight of the whole step is known before the backward pass, gradients are of the mean as they arise, so
    that gradient hooks see them so; otherwise they are of the sum, and False is returned. A loss scale is not divided
    out yet.
    """
    known = known_weights(built.plan, parts)
    weight = sum(known[1:], known[0]) if known else None
    scale = state.read().loss_scale.get("scale")
    totals: dict[str, Mean] = {}
    for i, part in enumerate(parts):
        if i:
            interrupt.check()
            reseed(key(state.seed, state.step, i, "forward"), built.device)
        means = built.forward(part, known[i] if known else None)
        if len(parts) == 1:
            weight = means["loss"].weight
        backward(built, means["loss"].total, weight, scale)
        detached = {name: mean.detach() for name, mean in means.items()}
        totals = {name: totals[name] + mean for name, mean in detached.items()} if i else detached
    return totals, weight is not None


def backward(built: Built, total: Tensor, weight: Tensor | float | None, scale: Tensor | None) -> None:
    """Run the backward pass of an objective divided by a weight, if one is given, and times a loss scale.

    Raises:
        ValueError: The objective depends on no parameter.
    """
    if not total.requires_grad:
        raise ValueError(_NOT_DIFFERENTIABLE)
    if scale is not None:
        total = wide(total)  # no half precision holds the scale
    share = None if weight is None else inverse(weight, total.dtype, built.device)
    if scale is not None:
        share = scale.to(total.dtype) if share is None else share * scale
    torch.autograd.backward(total, share)


_NOT_DIFFERENTIABLE = (
    "the objective's total does not depend on any trainable parameter: it was detached, computed under "
    "torch.no_grad(), or every parameter is frozen"
)


def known_weights(plan: Plan, parts: Sequence[Any]) -> list[Tensor | float]:
    """Weigh each of several microbatches before the first forward pass, where the loss can; nothing where it cannot."""
    if len(parts) == 1 or not isinstance(plan.loss, Objective):
        return []
    return [plan.loss.weight(part) for part in parts]


def known_weight(plan: Plan, parts: Sequence[Any]) -> Tensor | float | None:
    """Weigh all microbatches together; None where the loss cannot, or there is one."""
    weights = known_weights(plan, parts)
    return sum(weights[1:], weights[0]) if weights else None


def inverse(weight: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Divide one by a weight; nothing to weigh gives zero, so that a batch without labels moves nothing."""
    if isinstance(weight, Tensor) and weight.is_cpu:
        weight = weight.item()  # looking is free here, and one call is faster than three
    if not isinstance(weight, Tensor):
        return torch.scalar_tensor(1.0 / weight if weight else 0.0, dtype=dtype, device=device)
    return inverse_on_device(weight.to(dtype))


def inverse_on_device(weight: Tensor) -> Tensor:
    """Divide one by a weight that nobody waits for; nan, which stops a run, stays nan."""
    return weight.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)


def advance(
    built: Built,
    state: TrainState,
    gradients: Gradients,
    buffers: Flat | None,
    means: Mapping[str, Mean],
    wants: frozenset[str],
) -> tuple[TrainState, Metrics]:
    """Apply a gradient: transforms, the look at whether all is finite, the optimizer, averages, buffers, counters.

    The state is consumed when the optimizer begins: after the transforms, and on a CPU after the look.
    """
    plan, arrays = built.plan, state.read()
    check_layout("this gradient", gradients.layout, built.binding.layout)
    rates = rates_at(plan.schedule, plan.optimizer, state.step, arrays.controls)
    arrays, reports, _ = update_arrays(
        plan,
        arrays,
        gradients,
        buffers,
        means,
        flag=flag_on_host if built.device.type == "cpu" else flag_on_device,
        begin=lambda: state.consume(f"step {state.step}"),
        rates=rates,
        step=state.step,
        seed=state.seed,
        wants=wants,
    )
    if arrays.buffers is not built.binding.buffers:
        built.binding.bind_buffers(arrays.buffers)
    return following(state, arrays, gradients.samples), {**means, **reports, **rates.metrics()}


def following(state: TrainState, arrays: Arrays, samples: int) -> TrainState:
    """Make the state after a step: the counters of the host, and what the step has left on the device."""
    return TrainState(
        step=state.step + 1,
        samples=state.samples + samples,
        seed=state.seed,
        data=state.data,
        batch_size=state.batch_size,
        arrays=arrays,
    )


def update_arrays(
    plan: Plan,
    arrays: Arrays,
    gradients: Gradients,
    buffers: Flat | None,
    means: Mapping[str, Mean],
    *,
    flag: Flag,
    begin: Callable[[], object],
    rates: Rates,
    step: int | Tensor,
    seed: int | Tensor,
    wants: frozenset[str],
) -> tuple[Arrays, dict[str, Tensor], Tensor]:
    """Do what an update does to the arrays of a state, in place; ``begin`` is called before the first is touched.

    It is run as it stands, or traced into a graph.

    Returns:
        The arrays; what is reported; and the flag, 1 where the step was not finite and the run does not go on.
    """
    with torch.no_grad():
        extra: dict[str, Any] = dict(wanted.of_gradients(gradients, wants)) if wants else {}
        gradients, transforms = apply_all(
            plan.transforms, gradients, arrays.transforms, params=arrays.params, step=step, seed=seed
        )
        norm = gradients.norm()
        loss, overflow = means["loss"].total if "loss" in means else None, None
        if arrays.loss_scale:
            overflow = scaling.overflowed(arrays.loss_scale, norm, loss)
            extra["loss_scale"] = arrays.loss_scale["scale"].clone()  # in a graph, the state's own is written over
        probe = norm if loss is None else norm + loss
        verdict = flag(plan.on_nonfinite, probe, arrays.nonfinite, step, overflow)
        if transforms is not arrays.transforms:
            transforms = tree.gated(verdict.found_inf, arrays.transforms, transforms)
        begin()
        updated = wanted.of_update(arrays.params, wants, gradients.spread) if wants else None
        context = UpdateContext(rates.learning_rate, verdict.found_inf, rates.scheduled, step, seed)
        opt = plan.optimizer.update(gradients, arrays.opt, arrays.params, context)
        good = applied(verdict.found_inf)
        arrays = _averaged(plan, arrays, opt, transforms, verdict.found_inf, good)
        if updated is not None:
            extra |= updated()
        arrays = _counted(plan, arrays, gradients, buffers, verdict, good)
        if verdict.nonfinite is not arrays.nonfinite:
            arrays.nonfinite.copy_(verdict.nonfinite)
    stopped = verdict.found_inf if verdict.skipped is None else verdict.found_inf - verdict.skipped
    return arrays, {"grad_norm": norm, **gradients.reports, **extra}, stopped


def _averaged(
    plan: Plan, arrays: Arrays, opt: OptState, transforms: tuple[Any, ...], found_inf: Tensor, good: Tensor | float
) -> Arrays:
    arrays.updates.add_(good.long() if isinstance(good, Tensor) else int(good))
    ema = arrays.ema
    if plan.average is not None:
        assert ema is not None
        ema = plan.average.update(ema, arrays.params, found_inf=found_inf, updates=arrays.updates)
    if opt is arrays.opt and ema is arrays.ema and transforms is arrays.transforms:
        return arrays
    return attrs.evolve(arrays, opt=opt, ema=ema, transforms=transforms)


def _count(weight: Tensor) -> Tensor:
    """Count what was weighed; a weight that is not finite, as no integer is, counts for nothing."""
    return (weight.nan_to_num(0.0, 0.0, 0.0) if weight.is_floating_point() else weight).long()


def _counted(
    plan: Plan, arrays: Arrays, gradients: Gradients, buffers: Flat | None, verdict: Verdict, good: Tensor | float
) -> Arrays:
    found_inf, _, skipped = verdict
    weight = gradients.weight
    counted = _count(weight) if isinstance(weight, Tensor) else int(weight)
    if isinstance(good, Tensor) and plan.on_nonfinite == "raise":
        taken = good if skipped is None else good + skipped
        counted = counted * taken.long()  # a step that raises leaves everything as it was
    arrays.tokens.add_(counted)
    if skipped is not None:
        arrays.skipped.add_(skipped.long())
    if arrays.loss_scale:
        adapted = scaling.adapted(arrays.loss_scale, found_inf, FINE if skipped is None else skipped)
        arrays = attrs.evolve(arrays, loss_scale=adapted)
    if buffers is None or buffers is arrays.buffers:
        return arrays
    if buffers.layout is not arrays.buffers.layout:
        # A buffer changed its shape: its place in the storage is new, and whether to take it is asked of the device.
        return arrays if found_inf.item() else attrs.evolve(arrays, buffers=buffers.copy())
    for held, new in zip(arrays.buffers.buffers, buffers.buffers, strict=True):
        held.copy_(torch.where(found_inf > 0, held, new))
    return arrays
