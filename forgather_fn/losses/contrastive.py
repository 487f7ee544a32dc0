"""A contrastive loss: each sample is told from all others of its batch."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import leading_dimension
from forgather_fn.wide import wide


@described
def contrastive(*, temperature: float | None = 0.07, negatives: Literal["batch", "microbatch"] = "batch") -> Objective:
    """Let the two embeddings of a sample find each other among those of all samples: InfoNCE, in both directions.

    Its samples cannot be taken apart: the loss of one depends on which others are in the batch. So it is outside the
    laws of accumulation and of evaluation, by name: microbatches have fewer negatives than their batch, and an
    evaluation depends on its batch size. A plan of several microbatches is refused, unless each is to be a batch of its
    own. All entries of a batch are given to the model: by position from a tuple, by keyword from a dict.

    Sources: Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748; Radford et
    al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), arXiv 2103.00020.

    Args:
        temperature: What cosines of a pair of embeddings ``[batch, features]`` are divided by, where the model gives
            such a pair. None where it gives the similarities itself, ``logits_per_image`` ``[batch, batch]``, as CLIP
            of transformers does with a temperature that it learns.
        negatives: ``"batch"``: all others of the batch, which is one microbatch. ``"microbatch"``: of the microbatch.

    Raises:
        ValueError: An argument is none of these; when called: the model gives neither a pair nor similarities.

    Example:
        >>> apart = torch.eye(2)
        >>> float(contrastive(temperature=1.0)((apart, apart), apart))
        0.3133
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"contrastive: temperature must be a positive number, or None; got {temperature}")

    def total(outputs: Any, batch: Any) -> Tensor:
        scores = _given(outputs) if temperature is None else _cosines(outputs) / temperature
        scores = wide(scores)
        if scores.dim() != 2 or len(scores) != scores.shape[1] or len(scores) != leading_dimension(batch):
            raise ValueError(
                f"contrastive: similarities are {tuple(scores.shape)} of {leading_dimension(batch)} samples; expected "
                "one of each sample with each"
            )
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(scores.t(), own, reduction="sum")) / 2

    why = "each sample is told from all others, of which a microbatch has some; contrastive(negatives='microbatch') "
    return Objective(
        total=total,
        weight=leading_dimension,
        arguments=_everything,
        couples=why + "takes each for a batch of its own" if negatives == "batch" else "",
    )


def _everything(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _given(outputs: Any) -> Tensor:
    found = outputs.get("logits_per_image") if isinstance(outputs, Mapping) else None
    found = getattr(outputs, "logits_per_image", None) if found is None else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"contrastive: temperature=None, and the model's outputs ({type(outputs).__name__}) have no "
            "logits_per_image; give a temperature for a pair of embeddings"
        )
    return found


def _cosines(outputs: Any) -> Tensor:
    pair = outputs if isinstance(outputs, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(one, Tensor) and one.dim() == 2 for one in pair):
        raise ValueError(
            "contrastive: expected a pair of embeddings [batch, features] from the model, got "
            f"{type(outputs).__name__}; temperature=None takes logits_per_image"
        )
    one, other = (F.normalize(wide(side), dim=-1) for side in pair)
    return one @ other.t()
