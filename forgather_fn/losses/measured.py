"""Metrics of the same outputs, beside a loss."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.pairing import Paired
from forgather_fn.losses.terms import Beside
from forgather_fn.mean import Mean


@described
def with_metrics(loss: Objective, *metrics: Callable[[Any, Any], Mapping[str, Mean]] | Paired) -> Objective:
    """Report metrics beside a loss, in every step and in every evaluation.

    They are computed without gradients of the outputs that the loss has. Those of ``ff.metrics`` compare what the loss
    compares: an accuracy beside ``causal_lm`` is that of the next token.

    Args:
        loss: The objective.
        metrics: ``(outputs, batch) -> {name: Mean}``. An aggregate is no mean of parts, and belongs in an evaluation:
            ``program.evaluate(state, data, metrics=...)``.

    Raises:
        ValueError: One is no such function, or the loss does not tell which predictions belong to which targets; when
            called: a name is given twice.

    Example:
        >>> import forgather_fn as ff
        >>> ff.losses.with_metrics(ff.losses.causal_lm, ff.metrics.accuracy)
        with_metrics(loss=causal_lm, accuracy)
    """
    if not isinstance(loss, Objective):
        raise ValueError(
            f"with_metrics: {loss!r} is not an objective of ff.losses; return the metrics from it yourself"
        )
    if loss.around is not None:
        raise ValueError(f"with_metrics: {loss!r} never has all logits, which metrics look at; evaluate with another")
    found = tuple(one.as_in(loss) if isinstance(one, Paired) else one for one in metrics)
    for one, given in zip(found, metrics, strict=True):
        if not callable(one):
            raise ValueError(
                f"with_metrics: {given!r} is not a function of (outputs, batch) that gives means; an aggregate is for "
                "evaluations: program.evaluate(state, data, metrics=...)"
            )
    return attrs.evolve(loss, total=Beside(loss, found))
