"""Every law, over every piece of the registry (``tests/pieces``)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import toolz
import torch
from torch._dynamo.utils import counters

import forgather_fn as ff
from forgather_fn import testing, tree
from forgather_fn.program import Program
from forgather_fn.testing.compare import beyond, snapshot
from forgather_fn.testing.processes import Processes, processes
from forgather_fn.testing.subject import in_float64
from tests.pieces.piece import LAWS, Piece
from tests.pieces.registry import REGISTRY

STEPS = 4


def over(law: str) -> Callable[[Callable[..., None]], Any]:
    """Run a law over all rows. Where a row says that it does not hold, it must really fail: excuses do not outlive."""
    rows = [
        pytest.param(
            piece,
            id=name,
            marks=[pytest.mark.xfail(strict=True, reason=piece.outside[law])] if law in piece.outside else [],
        )
        for name, piece in sorted(REGISTRY.items())
    ]
    return pytest.mark.parametrize("piece", rows)


def trained(piece: Piece, program: Program) -> dict[str, Any]:
    """Train, and give every leaf of the final state and of all reports by its path."""
    seen: list[Mapping[str, float]] = []
    state = program.init(0)
    for tick in toolz.pipe(program.steps(state, piece.data()), *piece.stages(), ff.until(steps=STEPS)):
        state = tick.state
        seen.append({name: float(value) for name, value in {**tick.metrics, **tick.results}.items()})
    assert state.step == STEPS
    return snapshot({"state": state.as_tree(), "reports": seen})


def assert_close(expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        if isinstance(leaf, torch.Tensor | float):
            one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (leaf, found[path]))
            gap = beyond(one, other, 0.01, tolerance)
            assert gap is None, f"{path} differs {gap}"
        else:
            assert leaf == found[path], path


@over("purity")
def test_purity(piece: Piece) -> None:
    testing.check_purity(piece.plan(microbatches=2), piece.batch(5))


@over("donation")
def test_donation(piece: Piece) -> None:
    testing.check_donation(piece.plan(), piece.batch(5), steps=2)


@over("accumulation")
def test_accumulation(piece: Piece) -> None:
    """Three ragged microbatches are one whole batch: the gradient, and the run that comes of it."""
    testing.check_accumulation(piece.plan(), piece.batch(5), parts=(1, 3))
    with in_float64():
        whole, cut = (trained(piece, ff.single(piece.plan(precision="float64", microbatches=m))) for m in (1, 3))
    assert_close(whole, cut, 1e-9)


@over("evaluation")
def test_evaluation(piece: Piece) -> None:
    testing.check_evaluation(piece.plan(), piece.batch(5), metrics=piece.metrics())


@over("resume")
def test_resume(piece: Piece) -> None:
    testing.check_resume(piece.plan(microbatches=2), piece.data(), steps=STEPS, stages=piece.stages)


@over("compiled")
def test_compiled(piece: Piece) -> None:
    """A step that is compiled whole does what the step does that is not."""
    try:
        with in_float64():
            eager = trained(piece, ff.single(piece.plan(precision="float64")))
            graph = trained(piece, ff.single(piece.plan(precision="float64", compile=True, backend="aot_eager")))
    finally:
        torch._dynamo.reset()
        counters.clear()
    assert_close(eager, graph, piece.tolerance)


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    with processes(2) as two:
        yield two


@over("worlds")
def test_worlds(piece: Piece, pool: Processes) -> None:
    """Two processes end at the bits of one."""
    name = next(name for name, row in REGISTRY.items() if row is piece)
    expected = in_world(name)
    for rank, found in enumerate(pool.run(in_world, name)):
        odd = tree.difference(expected, found)
        assert odd is None, f"rank {rank}: {odd}"


def in_world(name: str) -> dict[str, Any]:
    piece = REGISTRY[name]
    return trained(piece, ff.accelerated(piece.plan(microbatches=4), reduction="tree"))


def test_every_law_is_run() -> None:
    assert {name.removeprefix("test_") for name in globals() if name.startswith("test_")} >= set(LAWS)
