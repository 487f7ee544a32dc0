"""Norms by module: from names and numbers alone, and from a training."""

import math

import pytest
import toolz
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.diagnostics import by_module, module_norms
from tests.toys import labelled, labelled_batches, program

GIVEN = {
    "loss": 1.0,
    "grad_norm": 9.0,
    "grad_norm/layers.0.mlp.weight": 3.0,
    "grad_norm/layers.0.norm.weight": 4.0,
    "grad_norm/layers.1.mlp.weight": 2.0,
    "grad_norm/scale": 5.0,
}


def nested() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, {"layers": math.sqrt(29.0), "scale": 5.0}),
        (2, {"layers.0": 5.0, "layers.1": 2.0, "scale": 5.0}),
        (9, {"layers.0.mlp": 3.0, "layers.0.norm": 4.0, "layers.1.mlp": 2.0, "scale": 5.0}),
    ],
)
def test_norms_are_joined_by_the_parts_of_names(depth, expected):
    found = by_module(GIVEN, depth=depth)
    assert found == pytest.approx({f"grad_norm/{name}": value for name, value in expected.items()})


def test_ratios_are_of_norms_of_modules_and_zeros_are_no_error():
    norms = {"update_norm/a.w": 3.0, "update_norm/a.b": 4.0, "param_norm/a.w": 10.0, "param_norm/a.b": 0.0}
    norms |= {"update_norm/b.w": 1.0, "param_norm/b.w": 0.0, "update_norm/c.w": 0.0, "param_norm/c.w": 0.0}
    found = by_module(norms | {"update_norm/d.w": 1.0}, depth=1)
    assert {name: found[name] for name in found if name.startswith("update_ratio/")} == {
        "update_ratio/a": 0.5,
        "update_ratio/b": math.inf,
        "update_ratio/c": 0.0,
    }
    assert by_module({}) == {}


def test_a_depth_of_no_parts_is_refused():
    with pytest.raises(ValueError, match="depth=0"):
        module_norms(depth=0)


def test_results_are_those_of_the_steps_that_are_looked_at():
    made, rows = program(nested()), []
    seen = {}

    def note(tick):
        seen[tick.state.step] = tick.state.copy()

    toolz.pipe(
        made.steps(made.init(0), labelled_batches(5)),
        ff.every(1, note),
        ff.every(2, module_norms(depth=1)),
        ff.every(1, ff.report(rows.append)),
        ff.last,
    )
    assert [any("/" in name for name in row.values) for row in rows] == [False, True, False, True, False]
    gradients, _, _ = made.gradients(seen[1], labelled(6, seed=1))
    for module in ("0", "1"):
        own = [name for name in seen[2].params if name.startswith(f"{module}.")]
        moved = torch.cat([(seen[2].params[name] - seen[1].params[name]).flatten() for name in own]).norm()
        size = torch.cat([seen[2].params[name].flatten() for name in own]).norm()
        gradient = torch.cat([gradients[name].flatten() for name in own]).norm()
        found = {name.partition("/")[0]: v for name, v in rows[1].values.items() if name.endswith(f"/{module}")}
        assert found == pytest.approx(
            {
                "grad_norm": float(gradient),
                "param_norm": float(size),
                "update_norm": float(moved),
                "update_ratio": float(moved / size),
            },
            rel=1e-4,
        )
