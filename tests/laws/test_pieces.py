"""Every law, over every piece of the registry (``tests/pieces``)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import toolz
import torch
from torch._dynamo.utils import counters

import forgather_fn as ff
from forgather_fn import testing, tree
from forgather_fn.losses import Objective
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
    testing.check_accumulation(piece.plan(), piece.batch(5), microbatches=(1, 3))
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


NAMESPACES = ("", "data", "losses", "optim", "reducers", "schedules", "transforms")
KINDS = ("Average", "Mixture", "Objective", "Optimizer", "Packed", "Reactive", "Reducer", "Stream", "Transform")
WITHIN = {
    "orthogonal": "optim.muon",
    "plateau": "on_plateau",
    "spikes": "folded",
    "stale": "early_stopped",
}
"""Pieces that are a part of another, in whose row they are."""


def public_pieces() -> Iterator[str]:
    """Name what makes a piece, by what it says that it returns."""
    for namespace in NAMESPACES:
        module = getattr(ff, namespace) if namespace else ff
        for name in dir(module):
            member = getattr(module, name)
            if isinstance(member, Objective):
                yield name
            elif inspect.isfunction(member) and not name.startswith("_"):
                made = inspect.signature(member).return_annotation
                if getattr(made, "__name__", "") in KINDS:
                    yield name


def test_every_piece_has_a_row() -> None:
    rows = {name.partition("/")[0].rpartition(".")[2] for name in REGISTRY}
    found = set(public_pieces())
    assert {"adamw", "clipped", "ema", "mse", "mixture", "on_plateau", "spikes"} <= found
    assert found - rows - set(WITHIN) == set()
    assert set(WITHIN) <= found
