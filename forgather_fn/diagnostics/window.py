"""Something that goes on during a few steps of a run."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import attrs
import torch

from forgather_fn.dispatch import closing
from forgather_fn.loop import Demand, Stage, Steps, Tick


def during(
    what: str,
    start: int,
    steps: int,
    begin: Callable[[torch.device, int], contextlib.AbstractContextManager[object]],
    around: Callable[[int], contextlib.AbstractContextManager[object]],
) -> Stage:
    """Enter a context before a step, and leave it when some steps have been made, or when the stream ends.

    The context lasts from before the first of the steps to after the last, with all that stands upstream, and with what
    observes them downstream between them. A run that is restored within the steps enters it for the rest.

    Args:
        what: The call that the stage is made by, for messages.
        start: The first step, by the number that it leads to, as :func:`~forgather_fn.stages.at` counts.
        steps: How many.
        begin: Makes the context, for a device and the rank of this process.
        around: ``step -> context`` of each of the steps alone.

    Raises:
        ValueError: A number is less than 1. When the stream is opened: it is known to end before the first step.
    """
    for name, value in {"start": start, "steps": steps}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what}: {name} must be an integer of at least 1, got {value!r}")
    last = start + steps - 1

    def told(step: int) -> None:
        if step < start:
            warnings.warn(f"{what}: the run ended at step {step}, before step {start}", stacklevel=2)

    def stage(upstream: Steps) -> Steps:
        def opened(demand: Demand) -> Iterator[Tick]:
            if demand.horizon is not None and upstream.state.step < demand.horizon < start:
                raise ValueError(f"{what}: the run ends at step {demand.horizon}, before step {start}")
            yield from _watched(upstream, demand)

        def _watched(upstream: Steps, demand: Demand) -> Iterator[Tick]:
            ticks = upstream.open(demand)
            step, device = upstream.state.step, upstream.state.updates.device  # the first step consumes the state
            with contextlib.ExitStack() as stack, closing(ticks):
                watching = stack.enter_context(contextlib.ExitStack())
                if start <= step + 1 <= last:
                    watching.enter_context(begin(device, upstream.world.rank))
                while True:
                    with around(step + 1) if start <= step + 1 <= last else contextlib.nullcontext():
                        tick = next(ticks, None)
                    if tick is None:
                        told(step)
                        return
                    step = tick.state.step
                    if step == last:
                        watching.close()
                    try:
                        yield tick
                    except GeneratorExit:
                        told(step)
                        raise
                    if step + 1 == start:
                        watching.enter_context(begin(device, upstream.world.rank))

        return attrs.evolve(upstream, open=opened)

    return stage
