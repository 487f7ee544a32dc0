"""Losses that are sums over elements, taken apart: what each element costs, and for how much it counts."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from forgather_fn.losses.base import Objective
from forgather_fn.losses.pairing import Pairing
from forgather_fn.mean import Mean
from forgather_fn.wide import wide


class ElementLosses(Protocol):
    """Compute the loss of each element."""

    def __call__(self, predictions: Tensor, targets: Tensor, beside: Tensor | None, /) -> Tensor:
        """Give losses ``[...]`` of predictions ``[..., classes]``, or ``[...]``, and targets, all in at least float32.

        Targets that do not count are of some class, or zero; what is computed of them is thrown away. ``beside`` is
        what :class:`Term` has put beside the targets, in line with them.
        """
        ...


@attrs.frozen(kw_only=True)
class Term:
    """One summand of a loss.

    Attributes:
        losses: What each element costs.
        share: What it is multiplied by.
        name: Under which it is reported by itself; "" for not.
        beside: ``batch -> tensor in line with the predictions``, what else it needs; None for nothing.
    """

    losses: ElementLosses
    share: float = 1.0
    name: str = ""
    beside: Callable[[Any], Tensor] | None = None


@attrs.frozen(kw_only=True)
class Terms:
    """What a loss is a sum of.

    Attributes:
        pairing: Which predictions belong to which targets.
        summands: Added up.
        counts: ``batch -> [...]``, for how much each element counts; where it is left out, anything.
    """

    pairing: Pairing
    summands: tuple[Term, ...]
    counts: Callable[[Any], Tensor] | None = None

    def weights(self, batch: Any) -> Tensor:
        """Tell for how much each element of a batch counts, 0 where it is left out; bool where each counts once."""
        keep = self.pairing.keep(batch)
        return keep if self.counts is None else torch.where(keep, self.counts(batch), 0.0)

    def prepared(self, batch: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Give what there is of a batch besides predictions: targets, weights, and what is beside them."""
        beside = [None if term.beside is None else term.beside(batch) for term in self.summands]
        return safe_targets(self.pairing, batch), self.weights(batch), beside

    def sums(self, predictions: Tensor, targets: Tensor, weights: Tensor, beside: list[Tensor | None]) -> list[Tensor]:
        """Sum up each part over elements that count, as multiplied by its share."""
        return [losses.sum() for losses in self.elements(predictions, targets, weights, beside)]

    def elements(
        self, predictions: Tensor, targets: Tensor, weights: Tensor, beside: list[Tensor | None]
    ) -> list[Tensor]:
        """Give what each element adds to each part: its loss times its weight and the part's share.

        Elements that do not count give no gradient, whatever lies in them; of losses of classes as long as their logits
        are finite, since to guard them would cost a copy of all logits.
        """
        keep = weights != 0
        predictions = wide(predictions)
        if not self.pairing.classes:
            predictions = torch.where(keep, predictions, 0.0)
        found = []
        for term, own in zip(self.summands, beside, strict=True):
            losses = term.losses(predictions, targets, own)
            found.append(term.share * torch.where(keep, losses * weights.to(losses.dtype), 0.0))
        return found

    def named(self, sums: list[Tensor]) -> Tensor | dict[str, Tensor | Mean]:
        """Add the parts up; those that have names are given too."""
        loss = sums[0]
        for other in sums[1:]:
            loss = loss + other
        reports = {term.name: one.detach() for term, one in zip(self.summands, sums, strict=True) if term.name}
        return {"loss": loss, **reports} if reports else loss


def safe_targets(pairing: Pairing, batch: Any) -> Tensor:
    """Give targets, of which those that do not count are 0."""
    keep, targets = pairing.keep(batch), pairing.targets(batch)
    targets = targets if targets.is_floating_point() else targets.long()
    return targets.masked_fill(~(keep if targets.dim() == keep.dim() else keep.unsqueeze(-1)), 0)


def total_weight(weights: Tensor) -> Tensor:
    """Add up what elements count, exactly where each counts once."""
    wide = torch.float64 if weights.is_floating_point() and weights.device.type != "mps" else None
    return weights.sum(dtype=wide)


def objective(terms: Terms, *, of: Objective | None = None, withheld: tuple[str, ...] = ()) -> Objective:
    """Make the objective that is the sum of terms.

    Args:
        terms: What it is the sum of.
        of: Another one, whose way of calling the model is kept.
        withheld: Further keys of a dict batch that are for the loss alone.
    """

    def total(outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor | Mean]:
        predictions = terms.pairing.predictions(outputs, batch)
        return terms.named(terms.sums(predictions, *terms.prepared(batch)))

    def weight(batch: Any) -> Tensor:
        return total_weight(terms.weights(batch))

    keys = dict.fromkeys([*terms.pairing.names, *(of.withheld if of else ()), *withheld])
    if of is None:
        return Objective(total=total, weight=weight, withheld=tuple(keys), terms=terms)
    return attrs.evolve(of, total=total, weight=weight, withheld=tuple(keys), terms=terms, passes_weight=False)


def terms_of(loss: Any, what: str, *, classes: bool | None = None) -> Terms:
    """Take a loss apart.

    Args:
        loss: As it was given.
        what: Who asks, for the message.
        classes: Whether it must be a loss of classes; None for any.

    Raises:
        ValueError: It is no sum over elements that is known here, or of another kind.
    """
    terms = loss.terms if isinstance(loss, Objective) else None
    if terms is None:
        raise ValueError(
            f"{what}: the loss {loss!r} is not known to be a sum over elements; it works on ff.losses.causal_lm, "
            "cross_entropy, binary_cross_entropy, mse, l1, huber, and what is made of them"
        )
    if loss.around is not None or isinstance(loss.total, Beside):
        last = "ff.losses.with_metrics" if isinstance(loss.total, Beside) else "ff.losses.chunked"
        raise ValueError(f"{what}: put {last} around this, not this around it: it must come last")
    if classes is not None and terms.pairing.classes is not classes:
        kind = "classes, such as ff.losses.cross_entropy" if classes else "values, such as ff.losses.mse"
        raise ValueError(f"{what}: it is for losses of {kind}, not for {loss!r}")
    return terms


@attrs.frozen
class Beside:
    """The total of an objective, with metrics of the same outputs beside it."""

    objective: Objective
    metrics: tuple[Callable[[Any, Any], Mapping[str, Mean]], ...]

    def __call__(self, outputs: Any, batch: Any) -> dict[str, Tensor | Mean]:
        """Sum up, and measure; see :class:`~forgather_fn.losses.base.Total`."""
        total = self.objective.total(outputs, batch)
        named: dict[str, Tensor | Mean] = {"loss": total} if isinstance(total, Tensor) else dict(total)
        with torch.no_grad():
            for metric in self.metrics:
                found = metric(outputs, batch)
                if set(found) & set(named):
                    raise ValueError(
                        f"with_metrics: {metric!r} names {sorted(set(found) & set(named))}, which is named already"
                    )
                named |= found
        return named
