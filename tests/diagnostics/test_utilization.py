"""Tokens seen, and what of a device is used."""

import pytest
import toolz

import forgather_fn as ff
from forgather_fn.diagnostics import flops_per_token, utilization
from tests.toys import classifier, labelled_batches, program


def rows(**options):
    made, found, now = program(classifier), [], iter(range(100))
    looks = utilization(100.0, clock=lambda: 2.0 * next(now), **options)
    toolz.pipe(made.steps(made.init(0), labelled_batches(6)), ff.every(2, looks, ff.report(found.append)), ff.last)
    return [row.values for row in found]


def test_it_is_of_the_tokens_between_two_looks():
    first, *rest = rows(peak_flops=1000.0)
    assert first["tokens_seen"] == 12
    assert "model_flops_utilization" not in first
    # 12 samples in 2 seconds, of 100 operations each, on a device of 1000 a second.
    assert [row["model_flops_utilization"] for row in rest] == [pytest.approx(0.6)] * 2
    assert rest[-1]["tokens_seen"] == 36


def test_tokens_may_be_counted_by_samples():
    found = rows(peak_flops=1000.0, tokens_per_sample=4)
    assert [row["tokens_seen"] for row in found] == [48, 96, 144]
    assert found[-1]["model_flops_utilization"] == pytest.approx(2.4)


def test_a_device_without_a_known_peak_is_refused_when_the_run_begins():
    made = program(classifier)
    state = made.init(0)
    with pytest.raises(ValueError, match="the peak of 'cpu' is not known; give it"):
        toolz.pipe(made.steps(state, labelled_batches(2)), ff.every(1, utilization(1.0)), ff.last)
    assert not state.consumed


@pytest.mark.parametrize("options", [{"flops_per_token": 0}, {"peak_flops": -1.0}, {"tokens_per_sample": float("inf")}])
def test_numbers_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a positive number"):
        utilization(**{"flops_per_token": flops_per_token(7)} | options)
