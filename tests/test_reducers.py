import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn import reducers

RESULTS = st.lists(st.floats(-2.0, 2.0).map(lambda number: round(number, 1)), max_size=40)


def folded(reducer, numbers):
    kept = reducer.init()
    for number in numbers:
        kept = reducer.add(kept, number)
    return kept


class TestPlateau:
    @given(
        results=RESULTS,
        patience=st.integers(0, 3),
        cooldown=st.integers(0, 3),
        threshold=st.sampled_from([0.0, 1e-4, 0.2]),
        mode=st.sampled_from(["relative", "absolute"]),
        greater=st.booleans(),
        minimum=st.sampled_from([0.0, 0.03]),
    )
    def test_its_rates_are_those_of_torch(self, results, patience, cooldown, threshold, mode, greater, minimum):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            mode="max" if greater else "min",
            factor=0.5,
            patience=patience,
            threshold=threshold,
            threshold_mode={"relative": "rel", "absolute": "abs"}[mode],
            cooldown=cooldown,
            min_lr=minimum,
            eps=0.0,
        )
        schedule = ff.schedules.on_plateau(
            0.1,
            factor=0.5,
            patience=patience,
            threshold=threshold,
            threshold_mode=mode,
            cooldown=cooldown,
            minimum=minimum,
            greater_is_better=greater,
        )
        kept = schedule.control.reducer.init()
        for result in results:
            theirs.step(result)
            kept = schedule.control.reducer.add(kept, result)
            assert ff.schedules.rate(schedule, 0, {"plateau": kept}) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-12
            )

    def test_the_minimum_does_not_lift_a_schedule_that_is_below_it(self):
        schedule = ff.schedules.on_plateau(ff.schedules.constant(0.1, warmup=10), factor=0.5, minimum=0.04, patience=0)
        kept = folded(schedule.control.reducer, [1.0, 1.0, 1.0])
        assert ff.schedules.rate(schedule, 1, {"plateau": kept}) == pytest.approx(0.01)
        assert ff.schedules.rate(schedule, 10, {"plateau": kept}) == pytest.approx(0.04)

    @pytest.mark.parametrize(
        "options", [{"factor": 1.0}, {"factor": 0.0}, {"patience": -1}, {"threshold": math.nan}, {"cooldown": -1}]
    )
    def test_numbers_out_of_range_are_refused(self, options):
        with pytest.raises(ValueError, match="plateau: "):
            reducers.plateau(**{"factor": 0.5} | options)

    def test_an_unknown_mode_is_refused(self):
        with pytest.raises(ValueError, match="threshold_mode='rel' is not one of 'relative', 'absolute'"):
            ff.schedules.on_plateau(0.1, threshold_mode="rel")

    def test_inside_another_schedule_it_is_refused(self):
        with pytest.raises(ValueError, match="written around others, not inside them"):
            ff.schedules.scaled(ff.schedules.on_plateau(0.1), factor=2.0)


class TestSpikes:
    def test_a_spike_is_far_above_what_is_usual(self):
        generator = torch.Generator().manual_seed(0)
        usual = (2.0 + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)).tolist()
        detector = reducers.spikes()
        kept, found = detector.init(), []
        for number in usual:
            kept = detector.add(kept, number)
            found.append(detector.result(kept))
        assert sum(found) == 0
        assert detector.result(detector.add(kept, 4.0)) == 1.0
        assert detector.result(detector.add(kept, 0.0)) == 0.0
        assert detector.result(detector.add(kept, math.nan)) == 1.0

    def test_its_bound_is_that_of_the_window(self):
        numbers = [1.0, 2.0, 3.0, 4.0, 100.0]
        detector = reducers.spikes(threshold=2.0, window=5, least=5)
        kept = folded(detector, numbers)
        bound = 3.0 + 2.0 * 1.4826 * 1.0
        assert detector.result(detector.add(kept, bound + 1e-9)) == 1.0
        assert detector.result(detector.add(kept, bound - 1e-9)) == 0.0

    def test_a_new_level_is_usual_when_half_of_the_window_has_seen_it(self):
        detector = reducers.spikes(window=10, least=5)
        kept = folded(detector, [1.0 + 0.01 * (i % 3) for i in range(10)])
        found = []
        for _ in range(10):
            kept = detector.add(kept, 5.0)
            found.append(detector.result(kept))
        assert found[0] == 1.0
        assert found[-1] == 0.0

    def test_what_is_kept_has_an_end(self):
        kept = folded(reducers.spikes(window=8, least=2), map(float, range(100)))
        assert kept["window"] == tuple(map(float, range(92, 100)))

    @pytest.mark.parametrize("options", [{"threshold": 0.0}, {"least": 1}, {"window": 4, "least": 5}])
    def test_numbers_out_of_range_are_refused(self, options):
        with pytest.raises(ValueError, match="spikes: expected threshold > 0"):
            reducers.spikes(**options)


@pytest.mark.parametrize("reducer", [reducers.plateau(factor=0.5), reducers.spikes(), reducers.stale()], ids=repr)
def test_adding_leaves_what_was_kept_as_it_was(reducer):
    kept = folded(reducer, [1.0, 2.0])
    before = dict(kept)
    for number in itertools.islice(itertools.cycle([0.5, 3.0]), 40):
        reducer.add(kept, number)
    assert kept == before
