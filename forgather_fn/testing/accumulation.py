"""Law 3: microbatches with ragged weights equal one big batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from forgather_fn import tree
from forgather_fn.batch import as_batch, microbatches, placed
from forgather_fn.data import Batch
from forgather_fn.flat import listed
from forgather_fn.losses import Objective, named_means
from forgather_fn.mean import Mean
from forgather_fn.model import call_arguments, enter_training, parameter_anatomy, surrounded
from forgather_fn.plan import Plan
from forgather_fn.testing.compare import LEAST_SCALE, ROUNDING, TOLERANCE, beyond, largest, means_difference, plain
from forgather_fn.testing.subject import Subject, in_float64, own_module, subject, tie, ties

_HINTS: Final = (
    "Likely causes: the loss's weight is not what its total is a sum over, or the loss or the model mixes samples (a "
    "mean of its own, a statistic over the batch, in-batch negatives)."
)


@attrs.frozen(eq=False)
class Taken:
    """The gradient of one step and the means that its loss named."""

    gradients: Mapping[str, Tensor]
    means: Mapping[str, Mean]


def check_accumulation(
    plan: Plan, batch: Any, *, microbatches: Sequence[int] | None = None, tolerance: float = TOLERANCE, seed: int = 0
) -> None:
    """Check that the gradient and the loss do not depend on how many microbatches a batch is cut into.

    The plan's program, in float64, is compared with plain autograd on the whole batch: the mean loss, and its gradient.

    Args:
        plan: Its loss and model are checked. A module in it is copied.
        batch: As ``program.step`` takes it; at least 3 samples, best of weights that are not alike (labels of -100).
        microbatches: Numbers of them. By default 1, 2, 3, the plan's own, and the least that cuts unequally.
        tolerance: By how much a leaf of the gradient may differ, relative to its largest element (at least a hundredth
            of the largest of all), and a mean, relative to its value (at least a hundredth).
        seed: Of the state.

    Raises:
        AssertionError: It names the leaf, the step and the sizes.
        ValueError: The model is outside this law: it has batch statistics, or draws random numbers in training
            (dropout). Or the batch is too small.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_accumulation(plan, (torch.ones(4, 2), torch.zeros(4, 1)), microbatches=(2, 3))
    """
    wrapped = as_batch(batch)
    counts = _counts(plan, wrapped.samples) if microbatches is None else tuple(microbatches)
    with in_float64():
        reason = outside(plan, batch, seed)
        if reason:
            raise ValueError(f"accumulation: {reason}")
        expected = _by_hand(plan, wrapped, seed)
        for count in counts:
            made = subject(plan, seed, precision="float64", microbatches=count)
            gradients, _, means = made.program.gradients(made.first, wrapped)
            found = _gradient_difference(made, expected, gradients, tolerance) or means_difference(
                expected.means, means, tolerance
            )
            if found:
                raise AssertionError(
                    f"accumulation: {_cut(plan, wrapped, count)} do not give at step 0 what one batch of "
                    f"{wrapped.samples} samples gives: {found}. {_HINTS} {ROUNDING}"
                )


def outside(plan: Plan, batch: Any, seed: int) -> str | None:
    """Say why this law does not hold for a model; None if nothing is known that speaks against it."""
    made = subject(plan, seed, precision="float64", microbatches=1)
    named = dict(made.module.named_modules())
    statistics = [name for name, m in named.items() if isinstance(m, _BatchNorm) and _uses_batch(m)]
    if statistics:
        return (
            f"{type(made.module).__name__} has batch statistics ({listed(statistics)}), which depend on how a batch is "
            "cut: microbatches cannot equal one big batch. Put these modules in evaluation mode (modes that are set "
            "part by part are kept), or use GroupNorm or LayerNorm."
        )
    _, _, means = made.program.gradients(made.first, batch)
    _, _, others = made.program.gradients(attrs.evolve(made.first, seed=seed + 1), batch)
    found = tree.difference(plain(means), plain(others))
    if found:
        dropouts = [name for name, m in named.items() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
        return (
            f"{type(made.module).__name__} draws random numbers in training (dropout: {listed(dropouts)}), and each "
            f"microbatch draws its own; under another seed, {found}. Check a model that is built with dropout=0.0."
        )
    return None


def _uses_batch(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def _counts(plan: Plan, samples: int) -> tuple[int, ...]:
    """Choose numbers of microbatches, one of which cuts unequally."""
    unequal = [count for count in range(2, samples) if samples % count]
    if not unequal:
        raise ValueError(f"accumulation: a batch of {samples} samples cannot be cut unequally; give at least 3")
    return tuple(sorted({1, 2, min(3, samples), min(plan.microbatches, samples), unequal[0]}))


def _by_hand(plan: Plan, batch: Batch, seed: int) -> Taken:
    """Compute the mean loss and its gradient as a few lines of plain torch do, in float64."""
    module = own_module(plan.model, seed)
    first = subject(plan, seed, precision="float64").first
    shared = ties(module)
    module.to(device=plan.device, dtype=torch.float64)
    tie(module, shared)
    with torch.no_grad():
        for name, parameter in parameter_anatomy(module).params.items():
            parameter.copy_({**first.params, **first.frozen}[name])
    enter_training(module)
    data = placed(batch.data, plan.device, torch.float64)
    args, kwargs = call_arguments(module, plan.loss)(data)
    with surrounded(module, plan.loss):
        outputs = module(*args, **kwargs)
    means = named_means(plan.loss(outputs, data))
    (means["loss"].total * _inverse(means["loss"].weight)).backward()  # type: ignore[no-untyped-call]
    return Taken(_gradients_by_name(module, shared), {name: mean.detach() for name, mean in means.items()})


def _inverse(weight: Tensor | float) -> float:
    return 1.0 / float(weight) if float(weight) else 0.0


def _gradients_by_name(module: nn.Module, shared: Mapping[str, str]) -> dict[str, Tensor]:
    """Add up the gradients of tied parameters under their first name."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():  # each object once
        if parameter.grad is not None:
            first = shared[name]
            gradients[first] = gradients[first] + parameter.grad if first in gradients else parameter.grad
    return gradients


def _gradient_difference(
    made: Subject, expected: Taken, gradients: Mapping[str, Tensor], tolerance: float
) -> str | None:
    trained = {name: expected.gradients[name] for name in made.first.params if name in expected.gradients}
    odd = sorted(set(trained) ^ set(gradients))
    if odd:
        return f"only one of them has a gradient for {listed(odd)}"
    scale = LEAST_SCALE * max(map(largest, trained.values()), default=0.0)
    for name, gradient in trained.items():
        found = beyond(gradient, gradients[name], scale, tolerance)
        if found:
            return f"the gradient of {name} differs {found}"
    return None


def _cut(plan: Plan, batch: Batch, count: int) -> str:
    """Describe microbatches: their sizes, and their weights where they are known from the batch."""
    parts = microbatches(batch, count)
    samples = [as_batch(part).samples for part in parts]
    text = f"{count} microbatches of {', '.join(map(str, samples))} samples"
    if isinstance(plan.loss, Objective):
        text += f" (weights {', '.join(f'{float(plan.loss.weight(part)):g}' for part in parts)})"
    return text
