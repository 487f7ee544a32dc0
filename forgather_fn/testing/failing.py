"""Failures planted in the user's own code, to see what a step leaves behind."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from torch import Tensor, nn

from forgather_fn.gradient import Gradients
from forgather_fn.losses import Loss, Objective
from forgather_fn.plan import Plan
from forgather_fn.testing.subject import Subject, subject
from forgather_fn.transforms import Transform


class PlantedError(BaseException):
    """A failure that a check has planted. Not an ``Exception``, so that it stands for Ctrl-C as well."""


@attrs.define(eq=False)
class Trap:
    """Counts how often a place in the code is passed, and fails there the ``last`` time."""

    passed: int = 0
    last: int | None = None

    def spring(self) -> None:
        """Pass once."""
        self.passed += 1
        if self.passed == self.last:
            raise PlantedError

    def arm(self) -> None:
        """Fail the next time that it is passed as often as it has been until now."""
        self.passed, self.last = 0, self.passed

    def disarm(self) -> None:
        """Fail no more."""
        self.last = None


Plant = Callable[[Plan, int, Trap], Subject]


def _in_forward(plan: Plan, seed: int, trap: Trap) -> Subject:
    """Fail at the end of the last microbatch's forward pass, when its buffers have been changed."""
    made = subject(plan, seed)
    made.module.register_forward_hook(lambda *_: trap.spring())
    return made


def _in_loss(plan: Plan, seed: int, trap: Trap) -> Subject:
    return subject(plan, seed, loss=_trapped_loss(plan.loss, trap))


def _trapped_loss(loss: Loss, trap: Trap) -> Loss:
    def total(outputs: Any, batch: Any) -> Any:
        trap.spring()
        return loss.total(outputs, batch) if isinstance(loss, Objective) else loss(outputs, batch)

    return attrs.evolve(loss, total=total) if isinstance(loss, Objective) else total


def _in_backward(plan: Plan, seed: int, trap: Trap) -> Subject:
    """Fail when the last parameter has got its gradient from the last microbatch."""
    made = subject(plan, seed)
    for parameter in made.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: trap.spring())  # type: ignore[no-untyped-call]
    return made


def _in_transform(plan: Plan, seed: int, trap: Trap) -> Subject:
    """Fail when all other transforms have changed the gradient."""

    def nothing(params: Mapping[str, Tensor]) -> None:
        del params

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, step, seed
        trap.spring()
        return gradients, state

    return subject(plan, seed, transforms=(*plan.transforms, Transform(nothing, update, "a planted failure")))


PLANTS: Final[Mapping[str, Plant]] = {
    "forward": _in_forward,
    "the loss": _in_loss,
    "backward": _in_backward,
    "a transform": _in_transform,
}


def gradients_held(module: nn.Module) -> dict[str, Tensor]:
    """Copy what lies in the ``.grad`` of each parameter, less those that hold nothing but zeros."""
    held = {name: p.grad for name, p in module.named_parameters(remove_duplicate=False) if p.grad is not None}
    return {name: grad.detach().clone() for name, grad in held.items() if bool(grad.count_nonzero())}
