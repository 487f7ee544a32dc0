import contextlib
import itertools
import math
import signal

import pytest
import toolz

import forgather_fn as ff
from tests.toys import classifier, labelled, labelled_batches, program


@pytest.fixture
def made():
    return program(classifier())


class Fetched:
    """Endless batches that are counted, and take a second each."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        for seed in itertools.count():
            self.count += 1
            yield labelled(6, seed=seed)

    def clock(self):
        return float(self.count)


def data(**changes):
    features, labels = labelled(10)
    return ff.batches((features, labels), **({"batch_size": 4} | changes))


class TestUntil:
    @pytest.mark.parametrize("ends", [{"steps": 3}, {"tokens": 18}, {"tokens": 13}, {"seconds": 3.0}, {"seconds": 2.5}])
    def test_it_never_fetches_more_than_its_last_batch(self, made, ends):
        fetched = Fetched()
        state = toolz.pipe(made.steps(made.init(0), fetched), ff.until(**ends, clock=fetched.clock), ff.last)
        assert (state.step, fetched.count) == (3, 3)

    @pytest.mark.parametrize(("ends", "expected"), [({"steps": 5, "tokens": 12}, 2), ({"steps": 1, "seconds": 9.0}, 1)])
    def test_the_first_end_counts(self, made, ends, expected):
        fetched = Fetched()
        state = toolz.pipe(made.steps(made.init(0), fetched), ff.until(**ends, clock=fetched.clock), ff.last)
        assert state.step == fetched.count == expected

    @pytest.mark.parametrize("ends", [{"steps": 2}, {"steps": 0}, {"tokens": 12}, {"seconds": 0}])
    def test_a_state_that_is_there_already_gives_no_tick(self, made, ends):
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        fetched = Fetched()
        assert toolz.pipe(made.steps(state, fetched), ff.until(**ends, clock=fetched.clock), ff.last) is state
        assert fetched.count == 0

    @pytest.mark.parametrize("last", ["span", "ragged", "drop"])
    @pytest.mark.parametrize("epochs", [1, 2, 1.5, 3])
    def test_epochs(self, made, last, epochs):
        stream = data(last=last)
        samples = [tick.state.samples for tick in ff.until(epochs=epochs)(made.steps(made.init(0), stream))]
        assert samples[-1] >= epochs * stream.epoch_length
        assert samples[-2] < epochs * stream.epoch_length
        # A run that was there already stays there.
        state = toolz.pipe(made.steps(made.init(0), stream), ff.until(epochs=epochs), ff.last)
        assert list(ff.until(epochs=epochs)(made.steps(state, stream))) == []

    def test_epochs_need_data_of_known_length(self, made):
        with pytest.raises(ValueError, match=r"until\(epochs=...\) needs a stream of known length"):
            ff.until(epochs=1)(made.steps(made.init(0), labelled_batches(3)))

    @pytest.mark.parametrize(
        "ends", [{}, {"steps": -1}, {"epochs": -0.5}, {"seconds": math.nan}, {"steps": 3, "tokens": -1}]
    )
    def test_an_end_is_needed_and_none_may_be_negative(self, ends):
        with pytest.raises(ValueError, match="until: give at least one end, none of them negative"):
            ff.until(**ends)

    def test_only_the_tokens_of_the_objective_count(self, made):
        features, labels = labelled(6)
        labels[:4] = -100
        state = toolz.pipe(made.steps(made.init(0), itertools.repeat((features, labels))), ff.until(tokens=5), ff.last)
        assert (state.step, state.tokens.item()) == (3, 6)


class TestDataThatEndBefore:
    @pytest.mark.parametrize(
        ("given", "ends", "message"),
        [
            (
                labelled_batches(3),
                {"steps": 30},
                r"step 3, before the 30 steps that until was asked for; a list is read on",
            ),
            (labelled_batches(2), {"tokens": 99, "seconds": 1e9}, "step 2, before the 99 tokens that until was"),
            (
                data(epochs=1),
                {"epochs": 2, "steps": 9},
                "step 3, before the 9 steps or 2 epochs that .*; the stream was m",
            ),
            ([], {"steps": 1}, "the data ended at step 0, before the 1 steps"),
        ],
        ids=["a list", "tokens", "a stream", "nothing"],
    )
    def test_are_told_once(self, made, given, ends, message):
        with pytest.warns(UserWarning, match=message) as told:
            toolz.pipe(made.steps(made.init(0), given), ff.until(**ends), ff.every(1, lambda tick: None), ff.last)
        assert len(told) == 1

    @pytest.mark.parametrize(
        ("ends", "stages"),
        [
            ({"steps": 3}, []),
            ({"steps": 9}, [ff.until(steps=3)]),
            ({"steps": 9}, [ff.stopped_by(lambda tick: tick.state.step == 3)]),
            ({"seconds": 1e9}, []),
        ],
        ids=["reached", "an earlier end", "another end", "time"],
    )
    @pytest.mark.parametrize("place", ["before", "after"])
    def test_but_no_other_end_is(self, made, ends, stages, place, recwarn):
        stages = [*stages, ff.until(**ends)] if place == "before" else [ff.until(**ends), *stages]
        toolz.pipe(made.steps(made.init(0), labelled_batches(3)), *stages, ff.last)
        assert not recwarn.list

    def test_nor_a_loop_that_is_left_or_broken(self, made, recwarn):
        for tick in ff.until(steps=9)(made.steps(made.init(0), labelled_batches(3))):
            if tick.state.step == 3:
                break
        ticks = iter(ff.until(steps=9)(made.steps(made.init(0), labelled_batches(3))))
        next(ticks)
        with pytest.raises(KeyError):
            ticks.throw(KeyError("mine"))
        assert not recwarn.list

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_nor_a_signal(self, made, number, recwarn):
        def send(tick):
            if tick.state.step == 3:
                signal.raise_signal(number)

        with contextlib.suppress(ff.Preempted):
            toolz.pipe(made.steps(made.init(0), labelled_batches(3)), ff.every(1, send), ff.until(steps=9), ff.last)
        assert not recwarn.list


class TestHorizon:
    def horizon(self, made, stream, *stages, begun=0):
        state = toolz.pipe(made.steps(made.init(0), stream), ff.until(steps=begun), ff.last)
        ticks = list(toolz.pipe(made.steps(state, stream), *stages))
        return ticks[0].run.horizon, ticks[-1].state.step

    def test_steps(self, made):
        assert self.horizon(made, data(), ff.until(steps=3)) == (3, 3)

    def test_the_nearest_of_several(self, made):
        stages = [ff.until(steps=5), ff.every(1, lambda tick: None), ff.until(steps=3), ff.until(steps=4)]
        assert self.horizon(made, data(), *stages) == (3, 3)

    @pytest.mark.parametrize("last", ["span", "ragged", "drop"])
    @pytest.mark.parametrize("epochs", [0.3, 1, 1.5, 2, 3, 3.7])
    @pytest.mark.parametrize("begun", [0, 1, 3, 4])
    def test_epochs(self, made, last, epochs, begun):
        stream = data(last=last)
        state = toolz.pipe(made.steps(made.init(0), stream), ff.until(steps=begun), ff.last)
        ticks = list(ff.until(epochs=epochs)(made.steps(state, stream)))
        if ticks:
            assert ticks[0].run.horizon == ticks[-1].state.step

    def test_unknown_ends_have_none(self, made):
        ticks = list(ff.until(tokens=6)(made.steps(made.init(0), labelled_batches(2))))
        assert ticks[0].run.horizon is None


def stopped_at(made, values, **options):
    """Run with these results at every step; None for no result."""

    def result(tick):
        value = values[tick.state.step - 1]
        return None if value is None else {"eval_loss": value}

    run = made.steps(made.init(0), labelled_batches(len(values)))
    return toolz.pipe(run, ff.every(1, result), ff.early_stopped(**options), ff.last).step


class TestEarlyStopped:
    @pytest.mark.parametrize(
        ("values", "options", "expected"),
        [
            ([3, 2, 1, 1, 1, 1], {"patience": 1}, 4),
            ([3, 2, 1, 1, 1, 1], {"patience": 2}, 5),
            ([3, 2, 1, 2, 0.5, 1, 1], {"patience": 2}, 7),
            ([1, 2, 3, 3, 3], {"patience": 1, "greater_is_better": True}, 4),
            ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.1}, 3),
            ([3, 2.85, 2.7], {"patience": 1, "min_delta": 0.1}, 3),
            ([3, None, None, None, 2, 2], {"patience": 1}, 6),
            ([math.nan, math.nan, 1, 1], {"patience": 2}, 2),
            ([1, math.nan, 0.5, math.nan, math.nan], {"patience": 2}, 5),
            ([-1.0, -2.0, -2.0], {"patience": 1}, 3),
            ([0.0, -1.0, 1.0], {"patience": 1, "greater_is_better": True}, 2),
        ],
    )
    def test_it_ends_after_so_many_looks_without_improvement(self, made, values, options, expected):
        assert stopped_at(made, values, **options) == expected

    def test_other_results_are_not_looked_at_and_named_at_the_end(self, made):
        with pytest.warns(UserWarning, match="waited for a result named 'eval_accuracy', which no observer found"):
            assert stopped_at(made, [1, 1, 1, 1], metric="eval_accuracy", patience=1) == 4

    def test_where_no_observer_found_anything_is_told_at_the_end(self, made):
        with pytest.warns(
            UserWarning, match=r"'eval_loss', and no observer found any while .* step 2: .*evaluated"
        ) as told:
            assert stopped_at(made, [None, None], patience=1) == 2
        assert len(told) == 1

    def test_so_is_a_schedule_that_reacts(self):
        made = program(classifier(), schedule=ff.schedules.on_plateau(1e-2, metric="loss"))
        with pytest.warns(UserWarning, match="'plateau' waited for a result named 'loss', .* is a metric of the step"):
            toolz.pipe(made.steps(made.init(0), labelled_batches(2)), ff.last)

    def test_an_evaluation_that_was_not_due_is_told_from_none(self, made):
        look = ff.every(100, ff.evaluated([labelled(5)]))
        with pytest.warns(UserWarning, match="up to step 2: the evaluation that is there was not due before"):
            toolz.pipe(made.steps(made.init(0), labelled_batches(2)), look, ff.early_stopped(patience=1), ff.last)

    @pytest.mark.parametrize("values", [[None, None], [1.0, 1.0]], ids=["no result", "another result"])
    def test_a_metric_of_the_step_is_told_from_a_result(self, made, values):
        with pytest.warns(UserWarning, match=r"\. 'loss' is a metric of the step, and .*\{'train_loss': float"):
            stopped_at(made, values, metric="loss", patience=1)

    def test_what_was_found_before_a_run_went_on_is_enough(self, made, recwarn):
        state = toolz.pipe(
            made.steps(made.init(0), labelled_batches(2)),
            ff.every(1, lambda tick: {"eval_loss": 1.0}),
            ff.early_stopped(patience=5),
            ff.last,
        )
        toolz.pipe(made.steps(state, labelled_batches(2)), ff.early_stopped(patience=5), ff.last)
        assert not recwarn.list

    def test_a_loop_that_is_left_says_nothing(self, made, recwarn):
        for _ in ff.early_stopped(patience=5)(made.steps(made.init(0), labelled_batches(2))):
            break
        assert not recwarn.list

    @pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 2, "min_delta": -0.1}])
    def test_negative_numbers_are_refused(self, options):
        with pytest.raises(ValueError, match="early_stopped: expected patience >= 1 and min_delta >= 0"):
            ff.early_stopped(**options)


def test_stopped_by_ends_after_the_tick_that_it_is_told(made):
    fetched = Fetched()
    state = toolz.pipe(
        made.steps(made.init(0), fetched),
        ff.every(1, lambda tick: {"x": tick.state.step}),
        ff.stopped_by(lambda tick: tick.results["x"] == 2),
        ff.last,
    )
    assert (state.step, fetched.count) == (2, 2)


@pytest.mark.parametrize(
    "ending",
    [ff.until(steps=2), ff.stopped_by(lambda tick: tick.state.step == 2), ff.early_stopped("x", patience=1)],
    ids=["until", "stopped_by", "early_stopped"],
)
def test_the_last_tick_is_seen_downstream(made, ending):
    seen = []
    toolz.pipe(
        made.steps(made.init(0), Fetched()),
        ff.every(1, lambda tick: {"x": 1.0}),
        ending,
        ff.every(1, lambda tick: seen.append(tick.state.step)),
        ff.last,
    )
    assert seen == [1, 2]
