"""Distillation: a model learns what another one says of each element."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forgather_fn.describe import describe
from forgather_fn.losses.base import Objective
from forgather_fn.losses.calling import call_arguments
from forgather_fn.losses.finding import logits_of
from forgather_fn.losses.terms import Term, objective, terms_of
from forgather_fn.losses.weighting import beside
from forgather_fn.signature import checked

Teacher = str | nn.Module | Callable[[Any], Tensor]
"""Whose logits are learned: a key of the batch, a module, or a function of the batch."""


@checked
def distilled(loss: Objective, *, teacher: Teacher, temperature: float = 2.0, share: float = 0.5) -> Objective:
    """Mix a loss with how far the model is from a teacher: ``(1 - share) * loss + share * distance``.

    The distance of an element is ``temperature ** 2`` times the divergence of Kullback and Leibler from the teacher's
    distribution to the model's, both with logits divided by the temperature; it is reported as ``distillation``, times
    its share. Elements are those of the loss, with its masks and weights.

    A teacher that is a module is no part of the state: it is in no checkpoint, and neither updated nor averaged. It is
    put in evaluation mode and frozen here, for good, and must be on the device of the model; it is called as the model
    is, on the same batch, without gradients, in its own data type.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        loss: A loss of classes.
        teacher: A key of the batch, under which its logits lie; a module; or a function of the batch. Logits have the
            shape of the model's: those of a language model are shifted here.
        temperature: Above 1, the teacher's small probabilities count for more.
        share: From 0 to 1.

    Raises:
        ValueError: The loss is of something else, or a number is out of its range; when called: the batch has no such
            key, logits have another shape than the model's, or the teacher is on another device.

    Example:
        >>> from forgather_fn.losses import cross_entropy
        >>> distilled(cross_entropy, teacher=nn.Linear(2, 3), share=0.9)
        distilled(loss=cross_entropy, teacher=torch.nn.modules.linear.Linear, temperature=2.0, share=0.9)
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"distilled: temperature must be a positive number, got {temperature}")
    if not 0 <= share <= 1:
        raise ValueError(f"distilled: share must be between 0 and 1, got {share}")
    terms = terms_of(loss, "distilled", classes=True)
    if any(term.name == "distillation" for term in terms.summands):
        raise ValueError(f"distilled: {loss!r} learns from a teacher already")
    answer = _answers(teacher, loss)

    def said(batch: Any) -> Tensor:
        with torch.no_grad():
            return terms.pairing.predictions(answer(batch), batch).detach()

    def distances(logits: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        del targets
        assert taught is not None
        if taught.shape != logits.shape:
            raise ValueError(
                f"distilled: the teacher's logits are {tuple(taught.shape)}, and the model's {tuple(logits.shape)}, "
                "where they are compared; they need the same classes"
            )
        ours, theirs = ((one.to(logits.dtype) / temperature).log_softmax(-1) for one in (logits, taught))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)

    hard = [attrs.evolve(term, share=term.share * (1 - share)) for term in terms.summands]
    soft = Term(losses=distances, share=share * temperature**2, name="distillation", beside=said)
    keys = (teacher,) if isinstance(teacher, str) else ()
    made = objective(attrs.evolve(terms, summands=(*hard, soft)), of=loss, withheld=keys)
    who = describe(type(teacher) if isinstance(teacher, nn.Module) else teacher)  # not all that a module says of itself
    text = f"distilled(loss={describe(loss)}, teacher={who}, temperature={temperature}, share={share})"
    return attrs.evolve(made, description=text)


def _answers(teacher: Teacher, loss: Objective) -> Callable[[Any], Any]:
    """Give what a teacher says of a batch, as outputs of a model."""
    if isinstance(teacher, str):
        return lambda batch: beside(batch, teacher, "distilled")
    if not isinstance(teacher, nn.Module):
        if not callable(teacher):
            raise ValueError(
                f"distilled: teacher={describe(teacher)} is no key of the batch, no module, and no function of the "
                "batch"
            )
        return teacher
    module = teacher.eval().requires_grad_(False)
    arguments = call_arguments(module, loss)

    def answer(batch: Any) -> Tensor:
        one = next((p for p in module.parameters() if p.is_floating_point()), None)
        args, kwargs = arguments(batch)
        if one is not None:
            args, kwargs = [_as(one, item) for item in args], {name: _as(one, item) for name, item in kwargs.items()}
        return logits_of(module(*args, **kwargs))

    return answer


def _as(parameter: Tensor, item: Any) -> Any:
    """Bring an input to the data type of the teacher."""
    if not isinstance(item, Tensor):
        return item
    if item.device != parameter.device:
        raise ValueError(
            f"distilled: the teacher is on {parameter.device}, and the batch on {item.device}; move it there before it "
            f"is given: teacher.to({str(item.device)!r})"
        )
    return item.to(parameter.dtype) if item.is_floating_point() else item
