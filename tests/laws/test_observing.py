"""Observing changes nothing: a run that is looked at in every way is, to the bit, the run that nobody looks at."""

import functools
from typing import Any

import pytest
import toolz

import forgather_fn as ff
from forgather_fn import diagnostics
from forgather_fn.wanted import WANTS
from tests.pieces.registry import REGISTRY
from tests.toys import Noisy, classifier, labelled_batches, program

PROGRAMS: dict[str, dict[str, Any]] = {
    "noisy": {"model": Noisy, "average": ff.ema(0.5)},
    "microbatches": {"model": Noisy, "microbatches": 3, "transforms": (ff.noise(0.01), ff.clipped(0.1))},
    "own_storage": {"model": classifier, "viewed_elements": 0},
    "compiled": {"model": functools.partial(classifier, hidden=8), "compile": True, "backend": "eager"},
    "compiled_model": {"model": classifier, "compile": "model", "backend": "eager"},
    "in_backward": {"model": Noisy, "update": "in_backward"},
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("every", [1, 3])
def test_all_diagnostics_at_once(name: str, every: int, tmp_path: Any) -> None:
    fields = dict(PROGRAMS[name])
    gradients = None if name == "in_backward" else "*"
    stages = [
        diagnostics.profiled(tmp_path, start=2, steps=2, memory=True),
        ff.every(
            every,
            diagnostics.module_norms(depth=1),
            diagnostics.activation_statistics(),
            diagnostics.histograms(tmp_path, gradients=gradients),
            diagnostics.utilization(42.0, peak_flops=1e9),
            ff.report(lambda row: None, wants=["gradient_norms", "parameter_norms", "update_norms"]),
        ),
    ]
    finals = []
    for looks in (stages, []):
        made = program(fields["model"], **{key: value for key, value in fields.items() if key != "model"})
        finals.append(toolz.pipe(made.steps(made.init(0), labelled_batches(5)), *looks, ff.last))
    assert ff.difference(*finals) is None


@pytest.mark.parametrize("name", REGISTRY)
def test_whatever_a_step_is_asked_for(name: str) -> None:
    piece = REGISTRY[name]
    finals = []
    for wants in (frozenset(WANTS), frozenset[str]()):
        made = ff.single(piece.plan())
        if made.plan.update == "in_backward":
            wants -= {"gradients"}
        run = made.steps(made.init(0), piece.data())
        looks = ff.every(1, ff.Observer(lambda tick: None, wants=wants))
        finals.append(toolz.pipe(run, looks, *piece.stages(), ff.until(steps=3), ff.last))
    assert ff.difference(*finals) is None
