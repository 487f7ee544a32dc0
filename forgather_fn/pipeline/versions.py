"""The model's buffers as each stage of a process has them in a step: what one changes, no other sees."""

import contextlib
from collections.abc import Iterator

import attrs

from forgather_fn.flat import Flat
from forgather_fn.pipeline.machine import Machine


@attrs.define(eq=False)
class Versions:
    """The buffers of a model, one version for each stage of this process.

    Every stage runs, besides its own modules, what the model makes of the batch, and what leads to that. A process with
    several stages would run those modules several times on the same buffers.

    Attributes:
        machine: The stages.
        before: The buffers before the step.
    """

    machine: Machine
    before: Flat
    _held: dict[int, Flat] = attrs.field(factory=dict)

    @contextlib.contextmanager
    def of(self, stage: int, counts: bool) -> Iterator[None]:
        """Let a stage change its version in a block; what a microbatch leaves that counts for nothing is forgotten."""
        binding = self.machine.built.binding
        held = self._held.get(stage, self.before)
        binding.bind_buffers(held.copy())
        yield
        self._held[stage] = binding.read_buffers() if counts else held

    def settle(self) -> None:
        """Leave each buffer in the model as the stage that keeps it has it; those of other processes as they were."""
        values = dict(self.before)
        for stage, held in self._held.items():
            for name in {**values, **held}:
                if self.machine.keeper(name) == stage:
                    values.pop(name, None)
                    values |= {name: held[name]} if name in held else {}
        self.machine.built.binding.store_buffers(values, like=self.before)
