"""A row of the registry."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

import forgather_fn as ff
from forgather_fn.loop import Stage
from forgather_fn.plan import Plan
from forgather_fn.program import Measure
from tests import specimens

LAWS: Final = ("purity", "donation", "accumulation", "evaluation", "resume", "compiled", "worlds")


def _known(instance: Any, attribute: Any, value: Mapping[str, str]) -> None:
    assert set(value) <= set(LAWS), f"no such law: {set(value) - set(LAWS)}"


@attrs.frozen(kw_only=True)
class Piece:
    """One piece, in a training that is as small as can be.

    Attributes:
        fields: Makes the fields of its plan; all others are those of a plain one, of a perceptron on classes.
        batch: ``samples -> data``, always the same: any model's that ``fields`` has.
        stream: Makes what it is trained on, where that is the piece; otherwise ``batch`` in a stream.
        stages: Makes the stages that it needs in a loop, as a function of its data.
        metrics: Makes what its evaluations measure besides the loss.
        outside: The laws that do not hold for it, with the reason. Such a law must really fail, or be refused.
        tolerance: What a compiled step may differ by, relative to the size, in float64.
    """

    fields: Callable[[], Mapping[str, Any]] = dict
    batch: Callable[[int], Any] = specimens.ragged_classes
    stream: Callable[[], Any] | None = None
    stages: Callable[[], tuple[Stage, ...]] = tuple
    metrics: Callable[[], tuple[Measure, ...]] = tuple
    outside: Mapping[str, str] = attrs.field(factory=dict, validator=_known)
    tolerance: float = 1e-10

    def plan(self, **changes: Any) -> Plan:
        """Make its plan, with some fields changed."""
        plain = {
            "model": specimens.mlp,
            "loss": ff.losses.cross_entropy,
            "optimizer": ff.sgd(),
            "schedule": falling,
        }
        return Plan(**plain | dict(self.fields()) | changes)

    def data(self) -> Any:
        """Make what it is trained on: batches of 4 out of 11 samples, so that they run across epochs."""
        return self.stream() if self.stream is not None else ff.batches(self.batch(11), batch_size=4)


def falling(step: int) -> float:
    """Give a learning rate that is another at each step, so that what counts steps wrongly is found."""
    return 0.05 / (1 + step)
