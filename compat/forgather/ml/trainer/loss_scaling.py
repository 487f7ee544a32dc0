"""The loss scale of ``fp16``, which the core keeps in the state, for training steps that users write."""

from collections.abc import Callable

import attrs
from torch import Tensor, nn


@attrs.define(eq=False)
class LossScaler:
    """What ``accelerator.backward`` calls of a scaler.

    Attributes:
        current: Gives the scale, or None where nothing is scaled.
        used: Whether a loss was scaled since this was set to False.
    """

    current: Callable[[], Tensor | None]
    used: bool = False

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the scale, in float32 at least."""
        scale = self.current()
        if scale is None:
            return loss
        self.used = True
        return loss * scale if loss.dtype.itemsize >= 4 else loss.float() * scale


def unscale(model: nn.Module, scale: Tensor, scaler: LossScaler) -> None:
    """Divide what the parameters' ``grad`` holds by the scale, in place.

    Raises:
        ValueError: No loss was scaled: a training step of the user's own called ``loss.backward()``.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if grads and not scaler.used:
        raise ValueError(
            "fp16=True scales the loss, and training_step did not let it: call self.accelerator.backward(loss) instead "
            "of loss.backward(), or use bf16=True"
        )
    for grad in grads:
        grad.div_(scale)
