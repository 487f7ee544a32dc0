"""Law 8: an evaluation does not depend on how its data is cut into batches."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import attrs
import torch

from forgather_fn import tree
from forgather_fn.batch import as_batch, microbatches
from forgather_fn.data import IndexedStream, Stream, batches
from forgather_fn.plan import Plan
from forgather_fn.program import Measure
from forgather_fn.testing.compare import LEAST_SCALE, ROUNDING, TOLERANCE, beyond, changed, snapshot
from forgather_fn.testing.subject import Subject, in_float64, subject
from forgather_fn.testing.surroundings import drawing_nothing, elsewhere

_HINTS: Final = (
    "Likely causes: the loss's weight is not what its total is a sum over, or in evaluation mode the model mixes "
    "samples or draws random numbers."
)

Cut: TypeAlias = Stream | Sequence[Any]


def check_evaluation(
    plan: Plan,
    data: Any,
    *,
    metrics: Sequence[Measure] = (),
    batch_sizes: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Check that an evaluation does not depend on the batch size or on a ragged end, and that it changes nothing.

    The plan's program evaluates, in float64, all of the data in one batch, in batches of one sample, of two, and of the
    least size that leaves a ragged end; where the plan keeps an average, that too. Each evaluation is repeated, must
    then give the same bits, and must leave the state, the training mode of every module, and the global random
    generators as they were.

    Args:
        plan: Its loss and model are checked. A module in it is copied.
        data: A dataset as :func:`~forgather_fn.data.batches` takes it, or a stream made by that, for its ``collate``. A
            few dozen samples are enough: each is run several times.
        metrics: What is measured besides the loss, as :class:`~forgather_fn.program.Evaluate` takes it.
        batch_sizes: Others than these.
        tolerance: By how much a result may differ, relative to its value (at least a hundredth).
        seed: Of the state.

    Raises:
        AssertionError: It names the result and the sizes.
        ValueError: There are fewer than 3 samples.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(2, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
        >>> check_evaluation(plan, (torch.ones(5, 2), torch.zeros(5, 1)))
    """
    stream = data if isinstance(data, Stream) else batches(data, batch_size=1)
    if not isinstance(stream, IndexedStream):
        raise ValueError(
            "check_evaluation cuts data in several ways: give a dataset that can be indexed, or its stream"
        )
    length = stream.length
    sizes = batch_sizes or sorted({length, 1, 2, _ragged(length)}, reverse=True)
    cuts = {f"batches of {size}": attrs.evolve(stream, batch_size=size) for size in sizes}
    compare_cuts(plan, cuts, length, tolerance, seed, metrics)


def check_microbatches(plan: Plan, batch: Any, *, tolerance: float, seed: int) -> None:
    """Check the same on the samples of one batch, cut as microbatches are."""
    whole = as_batch(batch)
    counts = sorted({1, 2, _ragged(whole.samples), whole.samples})
    compare_cuts(
        plan, {f"{count} batches": microbatches(whole, count) for count in counts}, whole.samples, tolerance, seed
    )


def _ragged(length: int) -> int:
    """Give the least batch size, or number of batches, that does not divide the data."""
    unequal = [size for size in range(2, length) if length % size]
    if not unequal:
        raise ValueError(f"evaluation: {length} samples cannot be cut unequally; give at least 3")
    return unequal[0]


def compare_cuts(
    plan: Plan,
    cuts: Mapping[str, Cut],
    length: int,
    tolerance: float,
    seed: int,
    metrics: Sequence[Measure] = (),
) -> None:
    """Evaluate the same samples, cut in several ways, and compare the results with the first."""
    with in_float64():
        made = subject(plan, seed, precision="float64")
        for params in ("params", "ema") if plan.average is not None else ("params",):
            results = {name: _evaluated(made, data, params, name, metrics) for name, data in cuts.items()}
            first, expected = next(iter(results.items()))
            for name, result in results.items():
                found = _difference(expected, result, tolerance)
                if found:
                    raise AssertionError(
                        f"evaluation: at step 0, with params={params!r}, {length} samples in {name} do not give what "
                        f"they give in {first}: {found}. {_HINTS} {ROUNDING}"
                    )


def _evaluated(made: Subject, data: Cut, params: Any, name: str, metrics: Sequence[Measure]) -> dict[str, float]:
    """Evaluate twice, and look at what is left behind."""
    kept = snapshot(made.first.as_tree())
    modes = [module.training for module in made.module.modules()]
    with drawing_nothing(f"evaluation: in {name}, it"):
        result = made.program.evaluate(made.first, data, params=params, metrics=metrics)
    found = changed(kept, made.first.as_tree())
    if found:
        raise AssertionError(f"evaluation: in {name}, it changed the state: {found}")
    if modes != [module.training for module in made.module.modules()]:
        raise AssertionError(f"evaluation: in {name}, it left a module in another mode (training or evaluation)")
    with elsewhere():
        again = made.program.evaluate(made.first, data, params=params, metrics=metrics)
    found = tree.difference(result, again)
    if found:
        raise AssertionError(f"evaluation: in {name}, done a second time, it gave other bits: {found}")
    return result


def _difference(expected: Mapping[str, float], result: Mapping[str, float], tolerance: float) -> str | None:
    if set(expected) != set(result):
        return f"the results are named {sorted(expected)} and {sorted(result)}"
    for name, value in expected.items():
        found = beyond(torch.tensor(value), torch.tensor(result[name]), LEAST_SCALE, tolerance)
        if found:
            return f"{name!r} differs {found}"
    return None
