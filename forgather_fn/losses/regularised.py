"""What is added to a cross-entropy: smoothed labels, and the z-loss."""

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.terms import Term, objective, terms_of


def chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the logit of each target's class; of probabilities, the mean under them."""
    if targets.is_floating_point():
        return (logits * targets).sum(-1)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _above_mean(logits: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
    del beside
    return chosen(logits, targets) - logits.mean(-1)


@described
def smoothed(loss: Objective, *, epsilon: float) -> Objective:
    """Take a cross-entropy against targets of which a share is spread over all classes.

    Written as a summand, ``epsilon * (logit of the class - mean logit)``, so that it goes with whatever else is added.

    Source: Szegedy et al., "Rethinking the Inception Architecture", arXiv 1512.00567; equal to ``label_smoothing`` of
    ``torch.nn.CrossEntropyLoss``, but that there class weights apply to the spread share class by class.

    Args:
        loss: A cross-entropy.
        epsilon: The share, from 0 to 1.

    Raises:
        ValueError: The loss is of something else, or the share is not between 0 and 1.

    Example:
        >>> from forgather_fn.losses import causal_lm
        >>> smoothed(causal_lm, epsilon=0.1)
        smoothed(loss=causal_lm, epsilon=0.1)
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"smoothed: epsilon must be between 0 and 1, got {epsilon}")
    terms = terms_of(loss, "smoothed", classes=True)
    return objective(attrs.evolve(terms, summands=(*terms.summands, Term(losses=_above_mean, share=epsilon))), of=loss)


def _log_z_squared(logits: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
    del targets, beside
    return torch.logsumexp(logits, -1).square()


@described
def with_z_loss(loss: Objective, *, coefficient: float = 1e-4) -> Objective:
    """Add the z-loss, which keeps the normaliser of the softmax near 1, and report it as ``z_loss``.

    It is ``coefficient * log(Z) ** 2``, where Z is the sum of the exponentials of the logits. The objective ``loss``
    contains it, also in an evaluation.

    Source: Chowdhery et al., "PaLM", arXiv 2204.02311, section 5.

    Args:
        loss: A cross-entropy.
        coefficient: Of at least 0.

    Raises:
        ValueError: The loss is of something else, or has a z-loss already, or the coefficient is negative.
    """
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"with_z_loss: coefficient must be a number of at least 0, got {coefficient}")
    terms = terms_of(loss, "with_z_loss", classes=True)
    if any(term.name == "z_loss" for term in terms.summands):
        raise ValueError(f"with_z_loss: {loss!r} has a z-loss already")
    term = Term(losses=_log_z_squared, share=coefficient, name="z_loss")
    return objective(attrs.evolve(terms, summands=(*terms.summands, term)), of=loss)
