"""A model's head that waits: it gives what its logits can be computed from, and not the logits."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TOUCHED: Final = (
    "the model does more to its logits than to multiply, divide, or tanh them ({what}), and ff.losses.chunked computes "
    "them after the model, in chunks; train this model with the loss that is not chunked"
)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)  # which torch.compile can build in a graph; attrs it cannot
class Deferred:
    """Logits that are not computed yet.

    Models that scale their logits or cap them (``tanh(logits / cap) * cap``) do so to this, and it is done to each
    chunk of logits; whatever else they try is an error.

    Attributes:
        hidden: ``[..., features]``, what the head was given.
        weight: ``[classes, features]``, the head's.
        bias: ``[classes]``, or None.
        steps: What is done to logits, in order: a factor, or None for tanh.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[Tensor | float | None, ...] = ()

    def __mul__(self, factor: Any) -> "Deferred":
        return self._then(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Deferred":
        return self._then(1.0 / divisor)

    def _then(self, step: Any) -> "Deferred":
        if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.dim() == 0):
            raise ValueError(_TOUCHED.format(what=f"a product with {type(step).__name__}"))
        return Deferred(self.hidden, self.weight, self.bias, (*self.steps, step))

    def float(self) -> "Deferred":
        """Leave it: losses are computed in at least float32."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types, kwargs
        if function is torch.tanh and isinstance(args[0], cls):
            one = args[0]
            return cls(one.hidden, one.weight, one.bias, (*one.steps, None))
        raise ValueError(_TOUCHED.format(what=getattr(function, "__name__", str(function))))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(_TOUCHED.format(what=f".{name}"))

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(_TOUCHED.format(what="an index"))


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Tensor | float | None, ...]) -> Tensor:
    """Compute the logits of some hidden states, as the model would have."""
    found = F.linear(hidden, weight, bias)
    for step in steps:
        found = torch.tanh(found) if step is None else found * step
    return found


@attrs.frozen(eq=False)
class _Deferring:
    """The forward of a head that waits."""

    head: nn.Linear

    def __call__(self, hidden: Tensor) -> Deferred:
        return Deferred(hidden, self.head.weight, self.head.bias)


@contextlib.contextmanager
def deferring(head: nn.Linear) -> Iterator[None]:
    """Let a head wait, for the time of a block."""
    held: dict[str, Callable[..., Any]] = head.__dict__
    held["forward"] = _Deferring(head)
    try:
        yield
    finally:
        del held["forward"]


def head_of(module: nn.Module, name: str | None) -> nn.Linear:
    """Find the layer that computes the logits.

    Args:
        module: The model.
        name: Of the layer; None for the output embeddings of a model of Hugging Face.

    Raises:
        ValueError: There is none of that name, the model does not tell, or it is no plain linear layer.
    """
    layers = [one for one, child in module.named_modules() if type(child) is nn.Linear]
    if name is None:
        tell = getattr(module, "get_output_embeddings", None)
        found = tell() if callable(tell) else None
        if found is None:
            raise ValueError(
                f"chunked: {type(module).__name__} does not tell which layer computes its logits; name it: head=... is "
                f"one of {layers[-5:]}"
            )
    else:
        found = dict(module.named_modules()).get(name)
        if found is None:
            raise ValueError(f"chunked: head={name!r} is no module of the model; its linear layers are {layers}")
    if type(found) is not nn.Linear or "forward" in vars(found):
        raise ValueError(
            f"chunked: the head is {type(found).__name__}, whose logits are not a plain product of hidden states and "
            "a weight, or whose forward was replaced; it must be a torch.nn.Linear. Use the loss that is not chunked"
        )
    return found
