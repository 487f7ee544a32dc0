"""Evaluation and prediction: the model on data, without gradients, leaving the state as it is."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs
import torch

from forgather_fn import interrupt
from forgather_fn.alike import bits, where
from forgather_fn.average import narrowed
from forgather_fn.batch import as_batch
from forgather_fn.built import Built
from forgather_fn.flat import Flat
from forgather_fn.metrics import Measure
from forgather_fn.model import evaluation_mode
from forgather_fn.plan import Plan
from forgather_fn.random import key, seeded
from forgather_fn.reading import Pass, Read, check_alike
from forgather_fn.state import Arrays, Params, TrainState, raise_if_nonfinite
from forgather_fn.tally import Found, Tally, combined, meter
from forgather_fn.world import ALONE, World

Numbered = Iterator[tuple[int | None, Any]]
"""Batches with their numbers; one whose number is None is run, but not counted."""


@attrs.frozen(eq=False)
class Pace:
    """How the processes of a world go through batches.

    Attributes:
        batches: ``(batches, world) -> batches``: brings those of this process in step with those of the others.
        told: ``(world, function) -> results``: runs a function on every process, and gives all what each found.
        bits: What values are told by, where all processes have the same.
    """

    batches: Callable[[Numbered, World], Numbered]
    told: Callable[[World, Callable[[], Any]], list[Any]]
    bits: Callable[[Flat], Sequence[int]]


def _in_step(batches: Numbered, world: World) -> Numbered:
    """Give equally many batches on every process; those that have no more run the first process's for nothing."""
    while True:
        own = next(batches, None)
        left = world.gather(own is not None)
        if not any(left):
            return
        spare = None if all(left) else world.broadcast(own[1] if own is not None and world.main else None)
        yield own if own is not None else (None, spare)


UNPACED: Final = Pace(lambda batches, world: batches, lambda world, function: world.each(function), bits)
"""Each process at its own pace; one that fails says so when the others have found theirs."""

PACED: Final = Pace(_in_step, lambda world, function: world.gather(function()), lambda params: ())
"""All together, where a model in shards cannot be run by some of them alone. One that fails leaves the others in the
middle of a transfer, so that there is no asking them: they are told by ``World.watch``."""


def evaluate(
    built: Built,
    state: TrainState,
    data: Any,
    params: Params,
    metrics: Sequence[Measure] = (),
    world: World = ALONE,
    pace: Pace = UNPACED,
) -> dict[str, float]:
    """Measure every sample once, by the loss and by metrics; see :class:`~forgather_fn.program.Evaluate`.

    Each process of a world takes one batch in turn. What was found of all batches is then added in their order, so that
    the result has the same bits for any number of processes.

    Raises:
        ValueError: The data gave no batch, a metric cannot be measured, or the plan keeps no average.
        NonFiniteError: A step before was not finite.
    """
    raise_if_nonfinite(state)
    measuring = meter(built.plan.loss, metrics, built.device)

    taken = Pass(data, world, built.device)

    def found_here() -> tuple[Read, Found]:
        tally = Tally(measuring)
        with evaluating(built, state, params) as used:
            own = [] if world.size == 1 else [*pace.bits(used), *pace.bits(state.read().buffers)]
            for number, item in pace.batches(iter(taken), world):
                if world.size == 1:  # several heed a signal together, after a step
                    interrupt.check()
                with seeded(key(state.seed, state.step, number or 0, "evaluate"), built.device):
                    reading = built.seen(built.place(as_batch(item).data), measuring)
                if number is not None:
                    tally.take(number, reading)
        return taken.read(purpose(state, params, metrics, own)), tally.found()

    reads, found = zip(*pace.told(world, found_here), strict=True)
    check_alike(reads)
    return combined(found, measuring.aggregates)


def purpose(state: TrainState, params: Params, metrics: Sequence[Measure], sums: Sequence[int] = ()) -> str:
    """Tell what an evaluation is of, and what the bits of its values sum to; all its processes tell the same."""
    names = [getattr(metric, "__qualname__", type(metric).__qualname__) for metric in metrics]
    return f"{where(state)}, params={params!r}{f' of the bits {[*sums]}' if sums else ''}, metrics={names}"


def apply(built: Built, state: TrainState, inputs: tuple[Any, ...], named: dict[str, Any], params: Params) -> Any:
    """Call the model on inputs in evaluation mode; see :class:`~forgather_fn.program.Apply`."""
    with (
        evaluating(built, state, params),
        seeded(key(state.seed, state.step, "apply"), built.device),
        built.autocast(),
    ):
        return built.module(*built.place(inputs), **built.place(named))


@contextlib.contextmanager
def evaluating(built: Built, state: TrainState, params: Params) -> Iterator[Flat]:
    """Bind the module to the parameters asked for, in evaluation mode; put modes and buffers back afterwards."""
    arrays = state.read()
    built.bound(arrays)
    used = chosen(built.plan, arrays, params)
    if used is not arrays.params:
        built.binding.bind(used, arrays.frozen, arrays.buffers)
    before = arrays.buffers.copy() if arrays.buffers else None
    modes = evaluation_mode(built.module)
    try:
        with torch.no_grad():
            yield used
    finally:
        modes.restore()
        if before is not None:
            arrays.buffers.assign(before)
        built.binding.bind(arrays.params, arrays.frozen, arrays.buffers)


def chosen(plan: Plan, arrays: Arrays, which: Params) -> Flat:
    """Give the parameters that a model is used with.

    Those that are trained, unless the optimizer says that others are meant: it evaluates another point than the one
    where it takes gradients, as schedule-free ones do. Or the average.

    Raises:
        ValueError: There is nothing of that name, or the plan keeps no average.
    """
    if which == "params":
        evaluated = plan.optimizer.evaluated
        if evaluated is None:
            return arrays.params
        with torch.no_grad():
            return evaluated(arrays.opt, arrays.params)
    if which != "ema":
        raise ValueError(f"params={which!r} is not one of 'params', 'ema', which is the average of any kind")
    if arrays.ema is None:
        raise ValueError("params='ema', but the plan keeps no average; add Plan(average=ff.ema(decay))")
    with torch.no_grad():
        return narrowed(arrays.ema, arrays.params)
