"""A pipeline of one process, which has all stages."""

import attrs

from forgather_fn.batch import owned
from forgather_fn.data import Batch
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.mean import Mean
from forgather_fn.pipeline.machine import Machine
from forgather_fn.pipeline.running import over
from forgather_fn.program import Metrics
from forgather_fn.share import Share
from forgather_fn.state import TrainState
from forgather_fn.step import eager


def proved(machine: Machine, share: Share) -> Execution:
    """Run steps as one device does, when the first batch has shown that the model can be cut as it was asked for.

    The norm is measured as over several processes, so that any number of them gives the same numbers.
    """
    base = eager(machine.built)
    spread = over(machine.line, frozenset())

    def prove(batch: Batch) -> None:
        if machine.flow is None:
            machine.prove(machine.built.place(owned(batch, share)[0][1]))

    def gradients(state: TrainState, batch: Batch) -> tuple[Gradients, Flat, dict[str, Mean]]:
        prove(batch)
        taken, buffers, means = base.gradients(state, batch)
        return attrs.evolve(taken, spread=spread), buffers, means

    def step(state: TrainState, batch: Batch, wants: frozenset[str]) -> tuple[TrainState, Metrics]:
        taken, buffers, means = gradients(state, batch)
        try:
            return base.advance(state, taken, buffers, means, wants)
        except BaseException:
            machine.built.workspace.clear()
            raise

    return Execution(step, gradients, base.advance, spread)
