"""The loss of each source of a mixture, beside the loss of all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

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

    An element that counts and is of a source without a name is refused where that costs nothing, which is on a CPU. On
    a device, where a look would wait for it, and in a compiled step, all these means are nan then.

    Args:
        loss: A sum over elements.
        names: Of the sources, in the order of their numbers: ``mixture.names``.
        label: The key of the batch that has the number of the source of each sample, int64, shape (batch,), as
            ``ff.data.mixture(..., label="source")`` puts it there. The model is not given it.

    Raises:
        ValueError: The loss is no sum over elements, or the names are not different; when called: the batch has no such
            key, or a number in it has no name.

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
        owns = [sources == number for number in range(len(names))]
        strange = (weights != 0) & ~torch.stack(owns).any(0)
        _check_known(strange, sources, names, label)
        unknown = torch.where(strange.any(), math.nan, 0.0)
        means = {}
        for name, own in zip(names, owns, strict=True):
            total = torch.where(own, losses, 0.0).sum() + unknown
            means[f"loss/{name}"] = Mean(total, total_weight(torch.where(own, weights, torch.zeros_like(weights))))
        return means

    return attrs.evolve(loss, total=Beside(loss, (measured,)), withheld=(*loss.withheld, label))


def _check_known(strange: Tensor, sources: Tensor, names: Sequence[str], label: str) -> None:
    """Refuse elements of sources without a name, where looking waits for nothing."""
    if strange.device.type != "cpu" or torch.compiler.is_compiling() or not bool(strange.any()):
        return
    numbers = torch.unique(sources[strange]).tolist()[:5]
    raise ValueError(
        f"by_source: batch[{label!r}] has {', '.join(map(str, numbers))}, and there are {len(names)} names, for the "
        f"numbers 0 to {len(names) - 1}: {', '.join(map(repr, names[:5]))}; give those of all sources, mixture.names"
    )
