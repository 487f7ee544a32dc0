"""Law 2: donation changes speed only, a consumed state refuses, a failed step consumes nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn import tree
from forgather_fn.testing import check_donation
from tests import zoo


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
@settings(max_examples=2)
@given(data=st.data(), samples=st.integers(3, 6))
def test_donation_changes_no_bits_and_failures_lose_nothing(
    name: str, storage: str, data: st.DataObject, samples: int
) -> None:
    check_donation(data.draw(zoo.plans(name, storage)), zoo.SPECIMENS[name].batch(samples))


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
def test_gradients_that_come_and_go_over_many_steps(storage: str) -> None:
    # Adam counts updates by parameter, and parameters that are updated together share a count while they agree.
    batches = [zoo.SPECIMENS["intermittent"].batch(samples) for samples in (3, 1, 2, 5, 1, 4)]
    plan = zoo.plan_of("intermittent", viewed_elements=zoo.STORAGES[storage])
    states = []
    for donate in (True, False):
        program = ff.single(zoo.plan_of("intermittent", viewed_elements=plan.viewed_elements, donate=donate))
        states.append(ff.fold(program.step, program.init(0), batches))
    assert ff.difference(*states) is None


def poisoned(name: str, samples: int) -> tuple[Any, Any]:
    """Give a batch whose first input is not a number."""
    x, y = zoo.SPECIMENS[name].batch(samples)
    return x.index_fill(0, torch.tensor([0]), torch.nan), y


NAN_GOES_THROUGH = [
    "mlp",
    "mlp_function",
    "batchnorm",
    "partly_frozen",
    "unused",
    "two_dtypes",
    "half",
    "odd",
    "dropout",
]


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", NAN_GOES_THROUGH)
@settings(max_examples=3)
@given(data=st.data())
def test_a_step_that_is_not_finite_changes_nothing(name: str, storage: str, data: st.DataObject) -> None:
    plan = data.draw(zoo.plans(name, storage))
    program, good, bad = ff.single(plan), zoo.SPECIMENS[name].batch(4), poisoned(name, 4)
    state, _ = program.step(program.init(0), good)
    kept = state.copy()
    if plan.on_nonfinite == "raise":
        with pytest.raises(ff.NonFiniteError, match="step 1"):
            program.step(state, bad)
        assert ff.difference(state, kept) is None
        return
    following, _ = program.step(state, bad)
    assert int(following.skipped) == int(kept.skipped) + 1  # a first scale of float16 may be too large for the good one
    assert (following.step, following.samples) == (kept.step + 1, kept.samples + 4)
    for part in ("params", "frozen", "buffers", "opt", "transforms", "ema", "updates", "nonfinite"):
        assert tree.difference(getattr(kept, part), getattr(following, part), part) is None
