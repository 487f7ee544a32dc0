"""The loss of each source of a mixture, beside the loss of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.terms import Beside, terms_of, total_weight
from forgather_fn.losses.weighting import beside, in_line
from forgather_fn.mean import Mean


@described
def by_source(loss: Objective, names: Sequence[str], *, label: str = "source") -> Objective:
    """Report the loss of each source of a mixture, as ``loss/NAME``, in every step and in every evaluation.

    What is minimised stays the same, to the bit. The losses of all elements are computed once more, without gradients,
    whatever the number of sources. Like every mean they are added up over microbatches, processes and batches, and
    divided once; of a source that had no part in a step, the mean is nan.

    Args:
        loss: A sum over elements.
        names: Of the sources, in the order of their numbers: ``mixture.names``.
        label: The key of the batch that has the number of the source of each sample, int64, shape (batch,), as
            ``ff.data.mixture(..., label="source")`` puts it there. The model is not given it.

    Raises:
        ValueError: The loss is no sum over elements, or the names are not different; when called: the batch has no such
            key.

    Example:
        >>> from forgather_fn.losses import mse
        >>> batch = {"y": torch.zeros(3), "source": torch.tensor([0, 1, 1])}
        >>> found = by_source(mse, ("code", "prose"))(torch.tensor([1.0, 2.0, 4.0]), batch)
        >>> {name: float(mean) for name, mean in found.items()}
        {'loss': 7.0, 'loss/code': 1.0, 'loss/prose': 10.0}
    """
    terms = terms_of(loss, "by_source")
    if not names or isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"by_source: expected the names of the sources, each once; got {names!r}")

    def measured(outputs: Any, batch: Any) -> Mapping[str, Mean]:
        found = beside(batch, label, "by_source")
        sources = in_line(found, batch, terms.pairing, f"by_source: batch[{label!r}]")
        targets, weights, others = terms.prepared(batch)
        predictions = terms.pairing.predictions(outputs, batch).detach()
        parts = terms.elements(predictions, targets, weights, others)
        losses = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        means = {}
        for number, name in enumerate(names):
            own = sources == number
            total = torch.where(own, losses, 0.0).sum()
            means[f"loss/{name}"] = Mean(total, total_weight(torch.where(own, weights, torch.zeros_like(weights))))
        return means

    return attrs.evolve(loss, total=Beside(loss, (measured,)), withheld=(*loss.withheld, label))
