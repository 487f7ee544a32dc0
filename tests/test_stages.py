import itertools
import math

import attrs
import pytest
import toolz
import torch
from torch.nn import functional as F

import forgather_fn as ff
from tests.toys import assert_equal, classifier, labelled, labelled_batches, program, trained


@pytest.fixture
def steps():
    """Endless steps of a small model, from step 0."""
    made = program(classifier())
    return made.steps(made.init(0), (labelled(6, seed=seed) for seed in itertools.count()))


class Clock:
    """Gives the time that a test has set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passing(self, durations):
        """Give a batch after each of these durations."""
        for duration in durations:
            self.now += duration
            yield labelled(6)


def noting(seen):
    return lambda tick: seen.append(tick.state.step)


class TestWhen:
    @pytest.mark.parametrize("steps_between", [1, 2, 3, 7])
    def test_every(self, steps, steps_between):
        seen = []
        toolz.pipe(steps, ff.every(steps_between, noting(seen)), ff.until(steps=7), ff.last)
        assert seen == [step for step in range(1, 8) if step % steps_between == 0]

    def test_every_goes_by_the_step_of_the_state_also_after_a_restart(self):
        made = program(classifier())
        state = ff.fold(made.step, made.init(0), labelled_batches(3))
        seen = []
        toolz.pipe(made.steps(state, labelled_batches(6)), ff.every(4, noting(seen)), ff.last)
        assert seen == [4, 8]

    def test_at(self, steps):
        seen, one = [], []
        toolz.pipe(steps, ff.at((2, 5, 100), noting(seen)), ff.at(3, noting(one)), ff.until(steps=7), ff.last)
        assert (seen, one) == ([2, 5], [3])

    def test_every_seconds(self):
        clock, seen = Clock(), []
        made = program(classifier())
        durations = [4.0, 5.0, 1.0, 9.9, 0.1, 30.0, 1.0, 9.0]
        run = made.steps(made.init(0), clock.passing(durations))
        toolz.pipe(run, ff.every_seconds(10.0, noting(seen), clock=clock), ff.last)
        # At 10 s; at 20 s; at 50 s, once; and at 60 s.
        assert seen == [3, 5, 6, 8]

    def test_seconds_are_counted_from_the_opening(self):
        clock, seen = Clock(), []
        made = program(classifier())
        run = ff.every_seconds(10.0, noting(seen), clock=clock)(made.steps(made.init(0), clock.passing([1.0, 10.0])))
        clock.now = 100.0
        ff.last(run)
        assert seen == [2]

    @pytest.mark.parametrize("ending", [lambda: ff.until(steps=3), lambda: ff.stopped_by(lambda t: t.state.step == 3)])
    @pytest.mark.parametrize("place", ["before", "after"])
    def test_at_end(self, steps, ending, place):
        seen = []
        stages = [ff.at_end(noting(seen)), ending()]
        final = toolz.pipe(steps, *(stages if place == "before" else reversed(stages)), ff.last)
        assert seen == [3]
        assert not final.consumed

    def test_at_end_when_the_data_ends(self):
        made, seen = program(classifier()), []
        toolz.pipe(made.steps(made.init(0), labelled_batches(2)), ff.at_end(noting(seen)), ff.last)
        assert seen == [2]

    def test_at_end_when_the_loop_is_left(self, steps):
        seen = []
        for tick in ff.at_end(noting(seen))(steps):
            if tick.state.step == 2:
                break
        assert seen == [2]

    @pytest.mark.parametrize("ending", ["before", "after", "data", "left"])
    def test_at_the_end_they_look_in_the_order_of_the_text_too(self, ending):
        seen, made = [], program(classifier())

        def one(tick):
            seen.append(("one", dict(tick.results)))
            return {"x": 1.0}

        def two(tick):
            seen.append(("two", dict(tick.results)))
            return {"y": tick.results["x"] + 1.0}

        last = ff.Observer(lambda tick: None, end=lambda tick: seen.append(("end", dict(tick.results))))
        stages = [ff.at_end(one), ff.every(9, last), ff.at_end(two)]
        stages = {"before": [ff.until(steps=2), *stages], "after": [*stages, ff.until(steps=2)]}.get(ending, stages)
        for tick in toolz.pipe(made.steps(made.init(0), labelled_batches(2)), *stages):
            if ending == "left" and tick.state.step == 2:
                break
        del tick
        assert seen == [("one", {}), ("end", {"x": 1.0}), ("two", {"x": 1.0})]

    def test_at_end_without_a_tick(self):
        made, seen = program(classifier()), []
        toolz.pipe(made.steps(made.init(0), []), ff.at_end(noting(seen)), ff.last)
        assert seen == []

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom"), SystemExit("boom")], ids=repr)
    @pytest.mark.parametrize("place", ["before", "after", "same", "data"])
    def test_a_stream_that_ends_by_an_exception_has_no_last_tick(self, place, error):
        seen, made = [], program(classifier())

        def fail(tick):
            if tick.state.step == 2:
                raise error

        def batches():
            yield from labelled_batches(2)
            if place == "data":
                raise error
            yield labelled(6)

        stages = {
            "before": [ff.every(1, fail), ff.at_end(noting(seen))],
            "after": [ff.at_end(noting(seen)), ff.every(1, fail)],
            "same": [ff.at_end(noting(seen)), ff.every(1, lambda tick: None, fail), ff.every(1, lambda tick: None)],
            "data": [ff.at_end(noting(seen)), ff.every(1, lambda tick: None)],
        }[place]
        with pytest.raises(type(error), match="boom"):
            toolz.pipe(made.steps(made.init(0), batches()), *stages, ff.last)
        assert seen == []

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ff.every(0), "every: the number of steps must be an integer of at least 1, got 0"),
            (lambda: ff.every(2.5), "every: .*got 2.5"),
            (lambda: ff.every(-1), "every: .*got -1"),
            (lambda: ff.every_seconds(0), "every_seconds: seconds must be positive, got 0"),
            (lambda: ff.every_seconds(float("nan")), "every_seconds: seconds must be positive"),
        ],
    )
    def test_impossible_intervals_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestComposition:
    def test_observers_look_in_the_order_of_the_text(self, steps):
        seen = []

        def named(name):
            return lambda tick: seen.append((tick.state.step, name))

        toolz.pipe(
            steps,
            ff.every(1, named("a"), named("b")),
            ff.every(2, named("c")),
            ff.every(1, named("d")),
            ff.until(steps=2),
            ff.last,
        )
        assert seen == [(1, "a"), (1, "b"), (1, "d"), (2, "a"), (2, "b"), (2, "c"), (2, "d")]

    def test_results_are_seen_downstream_and_not_upstream_and_not_later(self, steps):
        seen = []

        def give(**results):
            return lambda tick: results

        def note(tick):
            seen.append((tick.state.step, dict(tick.results)))

        toolz.pipe(
            steps,
            ff.every(1, note),
            ff.every(2, give(x=1.0, z=math.nan), give(y=3.0), give(x=1.0), note),
            ff.every(1, lambda tick: None, lambda tick: {}, note),
            ff.until(steps=3),
            ff.last,
        )
        whole = {"x": 1.0, "z": math.nan, "y": 3.0}
        assert seen == [(1, {}), (1, {}), (2, {}), (2, whole), (2, whole), (3, {}), (3, {})]

    @pytest.mark.parametrize("stage", [lambda *looks: ff.every(2, *looks), lambda *looks: ff.at_end(*looks)])
    def test_two_observers_of_one_name_are_refused(self, steps, stage):
        looks = [ff.evaluated([labelled(5, seed=seed)]) for seed in (1, 2)]
        with pytest.raises(ValueError, match=r"two observers found 'eval_loss' at step 2: .* and .*name='other'\)"):
            toolz.pipe(steps, stage(*looks), ff.until(steps=2), ff.last)

    @pytest.mark.parametrize("stage", [lambda look: ff.every(2, look), lambda look: ff.at_end(look)])
    def test_a_result_that_is_called_as_a_metric_of_the_step_is_refused(self, steps, stage):
        with pytest.raises(ValueError, match="found 'loss' at step 2, which is the name of a metric of the step"):
            toolz.pipe(steps, stage(lambda tick: {"loss": 0.5}), ff.until(steps=2), ff.last)

    def test_one_observer_may_find_something_else_where_it_looks_again(self, steps):
        seen, values = [], itertools.count()

        def look(tick):
            return {"x": float(next(values))}

        def nan(tick):
            return {"y": math.nan}

        def note(tick):
            seen.append((tick.results["x"], tick.results["y"]))

        again = ff.at_end(look, nan, note)
        toolz.pipe(steps, ff.every(1, look, nan), ff.at(2, look, nan, note), again, ff.until(steps=2), ff.last)
        assert [x for x, _ in seen] == [2.0, 3.0]

    def test_observers_do_not_change_the_run(self):
        made = program(classifier(), average=ff.ema(0.9))
        observers = [
            ff.evaluated([labelled(5)]),
            ff.evaluated([labelled(5)], params="ema", name="ema"),
            ff.report(lambda row: None, wants=["gradient_norms"]),
            lambda tick: tick.state.copy() and None,
            lambda tick: {"predicted": float(made.apply(tick.state, labelled(4)[0]).sum())},
        ]
        watched = toolz.pipe(made.steps(made.init(0), labelled_batches(6)), ff.every(2, *observers), ff.last)
        assert_equal(watched, trained(classifier(), labelled_batches(6), average=ff.ema(0.9)))

    def test_a_stage_can_be_used_for_several_runs(self):
        seen = []
        stage = toolz.compose_left(ff.every(2, noting(seen)), ff.until(steps=3))
        for _ in range(2):
            made = program(classifier())
            ff.last(stage(made.steps(made.init(0), labelled_batches(9))))
        assert seen == [2, 2]

    def test_a_loop_of_ones_own_over_stages(self, steps):
        losses = [
            float(tick.metrics["loss"]) for tick in toolz.pipe(steps, ff.every(2, lambda tick: None), ff.until(steps=4))
        ]
        assert len(losses) == 4


def wanting(*names):
    return ff.Observer(lambda tick: None, wants=frozenset(names))


class TestWants:
    def wanted(self, *stages, count=6):
        made, asked = program(classifier()), []

        def step(state, batch, /, *, wants=frozenset()):
            asked.append(wants)
            return made.step(state, batch)

        toolz.pipe(attrs.evolve(made, step=step).steps(made.init(0), labelled_batches(count)), *stages, ff.last)
        return asked

    def test_a_step_that_nobody_looks_at_is_asked_for_nothing(self):
        asked = self.wanted(ff.every(3, wanting("a")), ff.at(4, wanting("b", "c")), ff.every(2, wanting()))
        assert asked == [frozenset(), frozenset(), {"a"}, {"b", "c"}, frozenset(), {"a"}]

    def test_demands_pass_every_kind_of_stage(self):
        stages = [
            ff.until(steps=4),
            ff.early_stopped(patience=3),
            ff.stopped_by(lambda tick: False),
            ff.at_end(lambda tick: None),
            ff.every_seconds(1.0, lambda tick: None, clock=Clock()),
            ff.every(1, lambda tick: {"eval_loss": 1.0 / tick.state.step}),
            ff.at(2, wanting("a")),
        ]
        assert self.wanted(*stages) == [frozenset(), {"a"}, frozenset(), frozenset()]

    def test_those_whose_step_is_not_known_want_every_step(self):
        assert self.wanted(ff.at_end(wanting("a")), count=2) == [{"a"}, {"a"}]
        assert self.wanted(ff.every_seconds(1.0, wanting("a"), clock=Clock()), count=2) == [{"a"}, {"a"}]

    def test_what_is_wanted_is_found_in_the_metrics(self, steps):
        found = []

        def observe(tick):
            found.append(sorted(name for name in tick.metrics if name.startswith("grad_norm/")))

        observer = ff.Observer(observe, wants=frozenset({"gradient_norms"}))
        toolz.pipe(steps, ff.every(2, observer), ff.until(steps=2), ff.last)
        assert found == [["grad_norm/0.bias", "grad_norm/0.weight", "grad_norm/2.bias", "grad_norm/2.weight"]]

    def test_an_unknown_metric_is_refused(self, steps):
        with pytest.raises(ValueError, match=r"asked for \['color'\]; it can give \['.*gradient_norms'"):
            toolz.pipe(steps, ff.every(1, wanting("color")), ff.last)


class Life:
    """An observer that notes what is called of it."""

    def __init__(self, seen, name="", failing=()):
        self.seen, self.name, self.failing = seen, name, failing

    def observer(self):
        return ff.Observer(
            lambda tick: self.note("look"), open=lambda steps: self.note("open"), end=lambda tick: self.note("end"),
            close=lambda: self.note("close"),
        )  # fmt: skip

    def note(self, what):
        self.seen.append(self.name + what)
        if what in self.failing:
            raise RuntimeError(f"{what} failed")


STAGES = pytest.mark.parametrize(
    "stage",
    [
        lambda observer: ff.every(1, observer),
        lambda observer: ff.at(1, observer),
        lambda observer: ff.at_end(observer),
        lambda observer: ff.every_seconds(1.0, observer, clock=Clock()),
    ],
    ids=["every", "at", "at_end", "every_seconds"],
)


class TestLife:
    @STAGES
    def test_close_is_called_once_at_the_end(self, steps, stage):
        seen = []
        toolz.pipe(steps, stage(Life(seen).observer()), ff.until(steps=3), ff.last)
        assert seen[0] == "open"
        assert seen[-1] == "close"
        assert seen.count("open") == seen.count("close") == 1

    @STAGES
    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=repr)
    @pytest.mark.parametrize("place", ["up", "down", "data"])
    def test_close_is_called_once_on_exceptions(self, stage, error, place):
        made, seen = program(classifier()), []

        def fail(tick):
            raise error

        def batches():
            yield labelled(6)
            raise error

        watched = stage(Life(seen).observer())
        stages = {"up": [ff.at(1, fail), watched], "down": [watched, ff.at(1, fail)], "data": [watched]}[place]
        with pytest.raises(type(error), match="boom"):
            toolz.pipe(made.steps(made.init(0), batches()), *stages, ff.last)
        assert seen[0] == "open"
        assert seen[-1] == "close"
        assert seen.count("close") == 1
        assert "end" not in seen

    @STAGES
    def test_close_is_called_when_the_loop_is_left(self, steps, stage):
        seen = []
        for _ in stage(Life(seen).observer())(steps):
            break
        assert seen[-1] == "close"
        assert seen.count("close") == 1

    def test_an_observer_that_fails_is_closed_too_and_so_are_the_others(self, steps):
        seen = []
        lives = [Life(seen, "a."), Life(seen, "b.", failing={"look"}), Life(seen, "c.")]
        with pytest.raises(RuntimeError, match="look failed"):
            toolz.pipe(steps, ff.every(1, *(life.observer() for life in lives)), ff.last)
        assert sorted(seen[-3:]) == ["a.close", "b.close", "c.close"]

    def test_one_that_fails_to_close_keeps_no_other_from_closing(self, steps):
        seen = []
        lives = [Life(seen, name, failing={"close"} if name == "b." else ()) for name in ("a.", "b.", "c.")]
        with pytest.raises(RuntimeError, match="close failed"):
            toolz.pipe(steps, ff.every(1, *(life.observer() for life in lives)), ff.until(steps=1), ff.last)
        assert sorted(seen[-3:]) == ["a.close", "b.close", "c.close"]

    def test_one_that_fails_at_the_end_keeps_no_other_from_closing(self, steps):
        seen = []
        lives = [Life(seen, name, failing={"end"} if name == "b." else ()) for name in ("a.", "b.", "c.")]
        with pytest.raises(RuntimeError, match="end failed"):
            toolz.pipe(steps, ff.every(1, *(life.observer() for life in lives)), ff.until(steps=1), ff.last)
        assert sorted(seen[-3:]) == ["a.close", "b.close", "c.close"]

    @pytest.mark.parametrize(
        "stage",
        [
            lambda *observers: ff.every(1, *observers),
            lambda *observers: ff.at_end(*observers),
            lambda *observers: ff.every_seconds(1.0, *observers, clock=Clock()),
        ],
        ids=["every", "at_end", "every_seconds"],
    )
    def test_one_that_fails_to_open_has_no_step_made_and_the_others_closed(self, stage):
        made, seen = program(classifier()), []
        state = made.init(0)
        lives = [Life(seen, "a."), Life(seen, "b."), Life(seen, "c.", failing={"open"}), Life(seen, "d.")]
        stages = stage(*(life.observer() for life in lives))
        with pytest.raises(RuntimeError, match="open failed"):
            toolz.pipe(made.steps(state, labelled_batches(2)), stages, ff.last)
        assert not state.consumed
        assert seen == ["a.open", "b.open", "c.open", "b.close", "a.close"]

    def test_the_last_tick_is_told_once(self, steps):
        seen = []
        ends = ff.Observer(lambda tick: None, end=noting(seen))
        toolz.pipe(steps, ff.every(2, ends), ff.until(steps=3), ff.last)
        assert seen == [3]

    def test_nothing_is_opened_by_composing(self, steps):
        seen = []
        ff.every(1, Life(seen).observer())(steps)
        assert seen == []


def test_evaluated_names_its_results():
    made, seen = program(classifier(), loss=with_accuracy), []
    toolz.pipe(
        made.steps(made.init(0), labelled_batches(1)),
        ff.every(
            1,
            ff.evaluated([labelled(7)]),
            ff.evaluated([labelled(7)], name="test"),
            lambda tick: seen.append(tick.results),
        ),
        ff.last,
    )
    assert sorted(seen[0]) == ["eval_accuracy", "eval_loss", "test_accuracy", "test_loss"]


def with_accuracy(outputs, batch):
    right = (outputs.argmax(-1) == batch[1]).sum()
    loss = F.cross_entropy(outputs, batch[1], reduction="sum")
    return {"loss": ff.Mean(loss, len(batch[1])), "accuracy": ff.Mean(right, torch.tensor(len(batch[1])))}
