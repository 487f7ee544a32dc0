"""What a step is asked for: it is right, wherever it runs, and asking changes no bit."""

import functools

import pytest
import torch

import forgather_fn as ff
from forgather_fn.wanted import WANTS, check_wants, is_wanted
from tests.toys import Branches, Noisy, branching, classifier, labelled, program

EVERYTHING = frozenset(WANTS)
NUMBERS = EVERYTHING - {"gradients"}

WAYS = {
    "eager": {},
    "own_storage": {"viewed_elements": 0},
    "microbatches": {"microbatches": 3},
    "clipped": {"transforms": (ff.clipped(0.01),)},
    "ema": {"average": ff.ema(0.5)},
    "from_torch": {"optimizer": ff.from_torch(lambda groups: torch.optim.RMSprop(groups))},
    "compiled": {"compile": True, "backend": "eager"},
    "compiled_microbatches": {"compile": True, "backend": "eager", "microbatches": 3},
    "compiled_model": {"compile": "model", "backend": "eager"},
    "half": {"model": functools.partial(classifier, torch.bfloat16), "data": torch.bfloat16},
    "float16": {"precision": "float16"},
    "copying": {"donate": False},
}


def made_of(way):
    changes = dict(WAYS[way])
    dtype = changes.pop("data", torch.float32)
    return program(changes.pop("model", classifier), **changes), labelled(6, dtype=dtype)


def expected(before, after, gradients):
    """The metrics, from what can be seen from outside, in float64."""
    norm = {name: g.double().norm().item() for name, g in gradients.items()}
    return (
        {f"grad_norm/{name}": value for name, value in norm.items()}
        | {f"param_norm/{name}": p.double().norm().item() for name, p in after.params.items()}
        | {f"update_norm/{n}": (p.double() - before.params[n].double()).norm().item() for n, p in after.params.items()}
    )


@pytest.mark.parametrize("way", WAYS)
def test_norms_are_those_of_what_happened_and_asking_changes_nothing(way):
    made, batch = made_of(way)
    state = made.init(0)
    for _ in range(2):
        gradients, _, _ = made.gradients(state, batch)
        before, other = state.copy(), state.copy()
        state, metrics = made.step(state, batch, wants=EVERYTHING)
        unasked, plain = made.step(other, batch)
        assert ff.difference(state, unasked) is None
        assert {name for name in plain if not is_wanted(name, ())} == set()
        rel = 1e-2 if way == "half" else 1e-4
        for name, value in expected(before, state, gradients).items():
            assert metrics[name].dtype.itemsize >= 4
            assert float(metrics[name]) == pytest.approx(value, rel=rel, abs=1e-7), name
        for name, gradient in gradients.items():
            torch.testing.assert_close(metrics[f"gradient/{name}"], gradient, rtol=1e-5, atol=1e-7)


def test_gradients_are_before_transforms_and_stay_as_they_are():
    made = program(classifier, transforms=(ff.stateless(torch.zeros_like),))
    state, metrics = made.step(made.init(0), labelled(6), wants=frozenset({"gradients"}))
    kept = metrics["gradient/0.weight"].clone()
    assert kept.norm() > 0
    made.step(state, labelled(6, seed=1))
    assert torch.equal(metrics["gradient/0.weight"], kept)


def test_what_has_no_gradient_has_not_moved():
    made = program(Branches())
    _, metrics = made.step(made.init(0), branching(True, False), wants=NUMBERS)
    assert "grad_norm/right.weight" not in metrics
    assert float(metrics["update_norm/right.weight"]) == 0.0
    assert float(metrics["update_norm/left.weight"]) > 0.0


def test_a_skipped_step_has_not_moved():
    made = program(classifier(), on_nonfinite="skip")
    features, labels = labelled(6)
    _, metrics = made.step(made.init(0), (features * float("nan"), labels), wants=NUMBERS)
    assert {float(value) for name, value in metrics.items() if name.startswith("update_norm/")} == {0.0}


class TestInBackward:
    def test_numbers_are_those_of_an_update_after_it(self):
        states = {}
        for update in ("after_backward", "in_backward"):
            made = program(Noisy, update=update, viewed_elements=0)
            state, metrics = made.step(made.init(0), labelled(6), wants=NUMBERS)
            states[update] = state, {n: float(metrics[n]) for n in metrics if not is_wanted(n, ())}
        after, within = states.values()
        assert ff.difference(after[0], within[0]) is None
        assert after[1] == within[1]
        assert len(after[1]) == 3 * len(after[0].params)

    def test_a_parameter_without_a_gradient_has_not_moved(self):
        made = program(Branches(), update="in_backward")
        _, metrics = made.step(made.init(0), branching(True, False), wants=NUMBERS)
        assert float(metrics["update_norm/right.weight"]) == 0.0

    def test_all_gradients_are_refused_before_anything_is_consumed(self):
        made = program(classifier(), update="in_backward")
        state = made.init(0)
        with pytest.raises(ValueError, match="lets go of one by one"):
            made.step(state, labelled(6), wants=frozenset({"gradients"}))
        assert not state.consumed


def test_an_unknown_name_lists_the_known_ones_the_nearest_first():
    with pytest.raises(ValueError, match=r"\['update_norm'\]; it can give \['update_norms', "):
        check_wants({"update_norm"})
    made = program(classifier())
    state = made.init(0)
    with pytest.raises(ValueError, match="asked for"):
        made.step(state, labelled(6), wants=frozenset({"color"}))
    assert not state.consumed
