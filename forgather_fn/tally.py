"""What an evaluation has found of batches, and adding it up in their order."""

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from forgather_fn.losses import Loss, named_means
from forgather_fn.mean import Mean
from forgather_fn.metrics.base import Aggregate, Measure, Metric, Partial, sorted_out


@attrs.frozen(eq=False)
class Reading:
    """What was measured of one batch: means by name, and what each aggregate keeps of it."""

    means: Mapping[str, Mean]
    partials: tuple[Partial, ...]


@attrs.frozen(eq=False)
class Meter:
    """What is measured of each batch.

    Attributes:
        loss: Of the plan.
        metrics: Further means.
        aggregates: What is folded over batches.
        device: Where outputs are.
    """

    loss: Loss
    metrics: tuple[Metric, ...]
    aggregates: tuple[Aggregate, ...]
    device: torch.device

    def __call__(self, outputs: object, batch: object) -> Reading:
        """Measure a batch.

        Raises:
            ValueError: A metric gives no means, or a name is given twice.
        """
        means = dict(named_means(self.loss(outputs, batch)))
        for metric in self.metrics:
            found = metric(outputs, batch)
            if not isinstance(found, Mapping):
                raise ValueError(f"the metric {metric!r} gave {type(found).__name__}; expected {{name: Mean}}")
            _check_new(set(means), found)
            means |= named_means({"loss": means["loss"], **found})
        partials = []
        for aggregate in self.aggregates:
            begun = {name: self._placed(tensor) for name, tensor in aggregate.init().items()}
            partials.append(_checked(aggregate, begun, aggregate.add(begun, outputs, batch)))
        return Reading({name: mean.detach() for name, mean in means.items()}, tuple(partials))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32 if self._narrow(tensor) else tensor.dtype)

    def _narrow(self, tensor: Tensor) -> bool:
        return self.device.type == "mps" and tensor.dtype == torch.float64


def meter(loss: Loss, measures: Iterable[Measure], device: torch.device) -> Meter:
    """Make what measures batches of a loss and of metrics.

    Raises:
        ValueError: One of them cannot be measured.
    """
    return Meter(loss, *sorted_out(measures, loss), device)


def _check_new(known: set[str], found: Iterable[str]) -> None:
    twice = sorted(known & set(found))
    if twice:
        raise ValueError(f"metrics: {twice} is measured already, by the loss or by another metric; rename one of them")


def _checked(aggregate: Aggregate, begun: Partial, found: Partial) -> Partial:
    forms = [{name: (t.shape, t.is_floating_point()) for name, t in one.items()} for one in (begun, found)]
    if forms[0] != forms[1] or any(t.dtype == torch.bool or t.is_complex() for t in found.values()):
        raise ValueError(
            f"the aggregate {aggregate!r} keeps counts and sums by name, which keep their names, shapes and kinds "
            f"(integer or floating): it began with {_forms(begun)}, and add gave {_forms(found)}"
        )
    return found


def _forms(partial: Partial) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in partial.items()}


@attrs.frozen(eq=False)
class Found:
    """What one process has found.

    Attributes:
        sums: For each batch by its number, the total and the weight of each mean.
        counts: For each aggregate, its integers, added up.
        floats: For each aggregate, its floating tensors, for each batch by its number.
    """

    sums: Mapping[int, Mapping[str, tuple[float, float]]]
    counts: Sequence[Partial]
    floats: Sequence[Mapping[int, Partial]]


@attrs.define(eq=False)
class Tally:
    """What one process finds, while it goes through its batches; on the device until the end."""

    meter: Meter
    means: dict[int, Mapping[str, Mean]] = attrs.field(factory=dict)
    counts: list[dict[str, Tensor]] = attrs.field(factory=list)
    floats: list[dict[int, Partial]] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.counts = [{} for _ in self.meter.aggregates]
        self.floats = [{} for _ in self.meter.aggregates]

    def take(self, number: int, reading: Reading) -> None:
        """Take in what was measured of a batch."""
        self.means[number] = reading.means
        for counts, floats, partial in zip(self.counts, self.floats, reading.partials, strict=True):
            for name, tensor in partial.items():
                if not tensor.is_floating_point():
                    counts[name] = counts[name] + tensor if name in counts else tensor.detach().long()
            floats[number] = {name: tensor.detach() for name, tensor in partial.items() if tensor.is_floating_point()}

    def found(self) -> Found:
        """Bring all of it to the host."""
        return Found(
            sums={
                number: {name: (float(mean.total), float(mean.weight)) for name, mean in means.items()}
                for number, means in self.means.items()
            },
            counts=[_on_host(counts) for counts in self.counts],
            floats=[{number: _on_host(one) for number, one in floats.items()} for floats in self.floats],
        )


def _on_host(partial: Partial) -> dict[str, Tensor]:
    held = {name: tensor.cpu() for name, tensor in partial.items()}
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in held.items()}


def combined(told: Sequence[Found], aggregates: Sequence[Aggregate]) -> dict[str, float]:
    """Add up what processes have found, in the order of the batches, and make numbers of it.

    Raises:
        ValueError: There was no batch, or a name is given twice.
    """
    batches = {number: sums for found in told for number, sums in found.sums.items()}
    if not batches:
        raise ValueError(
            "the evaluation data gave no batch; an iterator can be used once only: pass a stream or a list"
        )
    totals: dict[str, tuple[float, float]] = {}
    for _, means in sorted(batches.items()):
        for name, (total, weight) in means.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + total, before[1] + weight
    numbers = {name: total / weight if weight else math.nan for name, (total, weight) in totals.items()}
    for i, aggregate in enumerate(aggregates):
        counts = [found.counts[i] for found in told]
        floats = {number: one for found in told for number, one in found.floats[i].items()}
        result = aggregate.result(_added([*counts, *(one for _, one in sorted(floats.items()))]))
        _check_new(set(numbers), result)
        numbers |= {name: float(value) for name, value in result.items()}
    return numbers


def _added(partials: Iterable[Partial]) -> Partial:
    total: dict[str, Tensor] = {}
    for partial in partials:
        for name, tensor in partial.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total
