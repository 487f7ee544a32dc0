import itertools
import math

import attrs
import pytest
import toolz

import forgather_fn as ff
from forgather_fn import tree
from tests.toys import assert_equal, classifier, labelled, labelled_batches, program


def data(count=5):
    return ff.batches(labelled(6 * count), batch_size=6)


def results(values, name="eval_loss"):
    """Observe what stands in a list, step by step."""
    return ff.every(1, lambda tick: {name: values[tick.state.step - 1]})


def zeroed(state):
    new = state.copy()
    for tensor in new.params.values():
        tensor.zero_()
    return new


def run(made, *stages, batches=None, state=None):
    return toolz.pipe(made.steps(state or made.init(0), batches or labelled_batches(6)), *stages)


class TestChanging:
    def test_the_next_step_and_stages_downstream_see_the_new_state(self):
        made = program(classifier(), optimizer=ff.sgd(), schedule=0.0)
        seen = []
        final = run(
            made,
            ff.changing(lambda tick: zeroed(tick.state) if tick.state.step == 2 else None),
            ff.every(1, lambda tick: seen.append(float(tick.state.params["0.weight"].abs().sum()))),
            ff.until(steps=4),
            ff.last,
        )
        assert seen[0] > 0
        assert seen[1:] == [0.0, 0.0, 0.0]
        assert all(not tensor.any() for tensor in final.params.values())
        assert not made.module()[0].weight.any()  # the module stands on it

    def test_the_old_state_is_consumed_where_the_new_one_has_tensors_of_its_own(self):
        made = program(classifier())
        before = []
        stages = [ff.every(1, lambda tick: before.append(tick.state)), ff.changing(lambda tick: tick.state.copy())]
        for _ in itertools.islice(run(made, *stages), 1):
            with pytest.raises(ff.ConsumedStateError, match="a change after step 1"):
                before[0].read()

    def test_one_that_shares_them_leaves_it_readable(self):
        made = program(classifier())
        before = []
        change = ff.changing(lambda tick: tick.state.controlled({"seen": tick.state.step}))
        for tick in itertools.islice(run(made, ff.every(1, lambda tick: before.append(tick.state)), change), 2):
            assert before[-1].params is tick.state.params
            assert tick.state.controls == {"seen": tick.state.step}

    def test_changes_act_in_the_order_in_which_they_are_written(self):
        made = program(classifier())

        def noted(name):
            return ff.changing(lambda t: t.state.controlled({"order": (*t.state.controls.get("order", ()), name)}))

        final = run(made, noted("a"), noted("b"), ff.until(steps=2), ff.last)
        assert final.controls == {"order": ("a", "b", "a", "b")}

    def test_a_loop_of_ones_own_changes_it_too(self):
        made = program(classifier(), schedule=0.0)
        for tick in run(made, ff.until(steps=2)):
            tick.changed(zeroed(tick.state))
        assert not made.module()[0].weight.any()

    def test_a_tick_that_is_past_cannot_be_changed(self):
        made = program(classifier())
        first = None
        for tick in run(made, ff.until(steps=2)):
            first = first or tick
        with pytest.raises(ValueError, match="the stream stands at step 2 and another state than this tick's"):
            first.changed(made.init(0))

    @pytest.mark.parametrize("field", ["step", "samples", "seed"])
    def test_another_position_is_refused(self, field):
        made = program(classifier())
        change = ff.changing(lambda tick: attrs.evolve(tick.state, **{field: 77}))
        with pytest.raises(ValueError, match="leaves the position as it is"):
            run(made, change, ff.last)

    def test_after_a_save_it_is_refused(self, tmp_path):
        made = program(classifier())
        for stage in (ff.changing(lambda tick: None), ff.rollback(after=1, every=1, on="x")):
            with pytest.raises(ValueError, match=r"Write the change before ff\.saved"):
                run(made, ff.every(1, ff.saved(tmp_path)), stage)

    def test_what_observes_the_end_sees_the_state_as_it_was_left(self):
        made = program(classifier())
        seen = []
        stages = [ff.at_end(lambda tick: seen.append(tick.state)), ff.changing(lambda tick: zeroed(tick.state))]
        run(made, *stages, ff.until(steps=1), ff.last)
        assert not seen[0].params["0.weight"].any()


def plateau(**options):
    return ff.schedules.on_plateau(ff.schedules.linear(peak=1.0, total=10), factor=0.5, patience=0, **options)


class TestOnPlateau:
    @pytest.mark.parametrize("changes", [{}, {"compile": True, "backend": "aot_eager"}, {"update": "in_backward"}])
    def test_later_steps_are_at_the_schedule_times_the_factor(self, changes):
        made = program(classifier(), schedule=plateau(), **changes)
        ticks = run(made, results([3.0, 3.0, 2.0, 2.0, 1.0, 1.0]))
        rates = [tick.metrics["learning_rate"] for tick in ticks]
        assert rates == pytest.approx([1.0, 0.9, 0.8 / 2, 0.7 / 2, 0.6 / 4, 0.5 / 4])

    def test_it_is_a_part_of_the_state_from_the_start(self):
        made = program(classifier(), schedule=plateau())
        assert made.init(0).controls == {"plateau": {"best": math.inf, "poor": 0, "cooldown": 0, "factor": 1.0}}
        assert "on_plateau(base=linear(peak=1.0" in made.plan.describe()["schedule"]

    def test_a_state_of_another_plan_is_refused(self):
        state = program(classifier()).init(0)
        made = program(classifier(), schedule=plateau())
        made.init(0)
        with pytest.raises(ValueError, match=r"reads controls\['plateau'\] of the state, which is not there"):
            made.step(state, labelled(6))

    def test_a_checkpoint_without_it_is_refused_unless_it_is_left_out(self, tmp_path):
        plain = program(classifier())
        ff.checkpoint.save(plain, plain.init(0), tmp_path)
        made = program(classifier(), schedule=plateau())
        with pytest.raises(ff.checkpoint.CheckpointError, match=r"controls: the checkpoint lacks \['plateau'\]"):
            made.restore(tmp_path, allow={"schedule"})
        state = made.restore(tmp_path, allow={"schedule"}, without={"controls"})
        assert state.controls["plateau"]["factor"] == 1.0

    def test_a_save_before_the_result_is_refused(self, tmp_path):
        made = program(classifier(), schedule=plateau())
        with pytest.raises(ValueError, match=r"Write ff\.saved\(\.\.\.\) after the observer that finds it"):
            run(made, ff.every(2, ff.saved(tmp_path)), results([1.0] * 6), ff.last)

    def test_a_run_that_goes_on_reacts_as_one_that_did_not_stop(self, tmp_path):
        values = [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
        made = program(classifier(), schedule=plateau())
        whole = run(made, results(values), ff.until(steps=6), ff.last, batches=data())
        for k in range(5):
            made = program(classifier(), schedule=plateau())
            state = run(
                made, results(values), ff.every(1, ff.saved(tmp_path / f"{k}")), ff.until(steps=k + 1), batches=data()
            )
            ff.last(state)
            again = program(classifier(), schedule=plateau())
            state = again.restore(tmp_path / f"{k}")
            assert_equal(run(again, results(values), ff.until(steps=6), ff.last, state=state, batches=data()), whole)


class TestEarlyStopped:
    def test_a_run_that_goes_on_counts_on(self, tmp_path):
        values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        made = program(classifier())
        stages = lambda: (results(values), ff.early_stopped(patience=3))  # noqa: E731
        assert run(made, *stages(), ff.last, batches=data()).step == 4
        run(made, *stages(), ff.every(1, ff.saved(tmp_path)), ff.until(steps=3), ff.last, batches=data())
        state = made.restore(tmp_path)
        assert state.controls == {"early_stopped/eval_loss": {"best": 1.0, "poor": 2}}
        final = run(made, *stages(), ff.last, state=state, batches=data())
        assert final.step == 4
        assert list(run(made, *stages(), state=final, batches=data())) == []

    @pytest.mark.parametrize("first", [True, False])
    def test_it_ends_at_the_tick_of_the_result_wherever_it_is_written(self, first):
        """Otherwise a run would end a step later than one that is taken up where it ought to have ended."""
        stages = [results([1.0] * 6), ff.early_stopped(patience=2)]
        made = program(classifier())
        assert run(made, *(reversed(stages) if first else stages), ff.last).step == 3

    def test_its_place_does_not_matter_to_what_is_saved(self, tmp_path):
        made = program(classifier())
        saved = ff.every(1, ff.saved(tmp_path))
        run(made, results([1.0] * 6), saved, ff.early_stopped(patience=3), ff.until(steps=3), ff.last, batches=data())
        assert made.restore(tmp_path).controls["early_stopped/eval_loss"]["poor"] == 2


class TestFolded:
    def test_what_it_comes_to_is_a_result_and_what_it_keeps_in_the_state(self):
        counting = ff.reducers.Reducer(
            lambda: {"n": 0}, lambda kept, loss: {"n": kept["n"] + 1}, lambda kept: kept["n"]
        )
        made = program(classifier())
        ticks = [(t.results["n"], t.state.controls["n"]) for t in run(made, ff.folded("n", counting))]
        assert ticks == [(i, {"n": i}) for i in range(1, 7)]

    def test_it_can_end_a_run(self):
        made = program(classifier(), optimizer=ff.sgd(), schedule=1e-4)
        batches = labelled_batches(12)
        batches[9] = batches[9][0] * 1e4, batches[9][1]
        watched = ff.folded("spike", ff.reducers.spikes(least=4))
        final = run(made, watched, ff.stopped_by(lambda tick: tick.results["spike"] > 0), ff.last, batches=batches)
        assert final.step == 10

    def test_an_unknown_metric_is_refused_with_the_known_ones(self):
        made = program(classifier())
        with pytest.raises(ValueError, match="the step has no metric 'los'; it has 'loss'"):
            run(made, ff.folded("x", ff.reducers.stale(), metric="los"), ff.last)


class TestNames:
    """What is kept has a name, which nothing else may have: one would overwrite the other."""

    @pytest.mark.parametrize(
        "stages",
        [
            lambda: (ff.folded("a", ff.reducers.stale()), ff.folded("a", ff.reducers.stale(), metric="grad_norm")),
            lambda: (ff.folded("plateau", ff.reducers.stale()),),
            lambda: (ff.folded("members", ff.reducers.stale()),),
            lambda: (ff.folded("rollback", ff.reducers.spikes()), ff.rollback(after=1, every=1, on="rollback")),
            lambda: (ff.rollback(after=1, every=1), ff.rollback(after=2, every=1)),
            lambda: (ff.folded("early_stopped/eval_loss", ff.reducers.stale()), ff.early_stopped(patience=1)),
        ],
        ids=["twice", "of the schedule", "of a joint state", "of a rollback", "two rollbacks", "of an ending"],
    )
    def test_two_of_one_name_are_refused(self, stages):
        made = program(classifier(), schedule=plateau(), on_nonfinite="skip")
        with pytest.raises(ValueError, match=r"keep something under controls\["):
            run(made, *stages(), ff.last)

    def test_what_another_reducer_has_kept_is_refused(self):
        made = program(classifier())
        state = run(made, ff.folded("a", ff.reducers.stale()), ff.until(steps=1), ff.last)
        with pytest.raises(ValueError, match=r"controls\['a'\] of the state is .* spikes\(.* has not kept: it keeps"):
            run(made, ff.folded("a", ff.reducers.spikes()), ff.last, state=state)


def poisoned(*bad, count=8):
    """Make batches, some of which have a nan."""
    batches = labelled_batches(count)
    for i in bad:
        batches[i] = batches[i][0] * math.nan, batches[i][1]
    return batches


class TestRollback:
    @pytest.mark.parametrize("changes", [{}, {"compile": True, "backend": "aot_eager"}])
    def test_it_goes_back_to_the_last_good_copy_and_on_in_the_data(self, changes):
        changes = {"on_nonfinite": "skip", "average": ff.ema(0.5), **changes}
        made = program(classifier(), **changes)
        batches = poisoned(3, 4)
        kept, found = {}, []
        for tick in run(made, ff.rollback(after=2, every=2), batches=batches):
            kept[tick.state.step] = tick.state.copy()
            found.append(tick.results.get("rolled_back"))
        assert found == [None, None, None, None, 1.0, None, None, None]
        for name in ("params", "opt", "ema", "buffers", "updates"):
            assert tree.difference(kept[5].as_tree()[name], kept[2].as_tree()[name]) is None
            assert tree.difference(kept[4].as_tree()[name], kept[3].as_tree()[name]) is None
        assert (kept[5].step, kept[5].samples, int(kept[5].skipped)) == (5, 30, 2)
        assert kept[5].controls["rollback"] == {"bad": 0, "times": 1}
        # After it, the run is that of the copy on the later batches.
        other = program(classifier(), **changes)
        other.init(0)
        expected = ff.fold(other.step, attrs.evolve(kept[2].copy(), step=5), batches[5:])
        for name in ("params", "opt", "ema"):
            assert tree.difference(kept[8].as_tree()[name], expected.as_tree()[name]) is None

    def test_the_state_that_it_started_from_is_the_first_copy(self):
        made = program(classifier(), on_nonfinite="skip")
        ticks = run(made, ff.rollback(after=2, every=100), batches=poisoned(1, 2, count=3))
        final = ff.last(ticks)
        assert tree.difference(dict(final.params), dict(program(classifier()).init(0).params)) is None

    def test_no_copy_is_made_while_steps_are_bad(self):
        made = program(classifier(), on_nonfinite="skip")
        final = run(made, ff.rollback(after=3, every=2), ff.last, batches=poisoned(3, 4, 5, count=6))
        good = run(program(classifier()), ff.until(steps=2), ff.last, batches=poisoned())
        assert tree.difference(dict(final.params), dict(good.params)) is None

    def test_a_good_step_between_begins_the_count_anew(self):
        made = program(classifier(), on_nonfinite="skip")
        final = run(made, ff.rollback(after=2, every=1), ff.last, batches=poisoned(1, 3, 5))
        assert final.controls["rollback"] == {"bad": 0, "times": 0}

    def test_spikes_are_bad_too(self):
        made = program(classifier())
        stages = ff.every(1, lambda t: {"spike": t.state.step in (9, 10)}), ff.rollback(after=2, every=1, on="spike")
        ticks = run(made, *stages, batches=labelled_batches(12))
        kept = {tick.state.step: tick.state.copy() for tick in ticks}
        assert tree.difference(dict(kept[10].params), dict(kept[8].params)) is None
        assert tree.difference(dict(kept[9].params), dict(kept[8].params)) is not None

    def test_the_count_goes_on_in_a_restored_run(self, tmp_path):
        made = program(classifier(), on_nonfinite="skip")
        ticks = run(made, ff.rollback(after=2, every=1), ff.until(steps=4), batches=poisoned(3, 4))
        state = ff.last(ticks)
        ff.checkpoint.save(made, state, tmp_path)
        again = made.restore(tmp_path)
        assert again.controls["rollback"] == {"bad": 1, "times": 0}
        ticks = run(made, ff.rollback(after=2, every=1), state=again, batches=poisoned(4)[4:])
        assert next(iter(ticks)).state.controls["rollback"] == {"bad": 0, "times": 1}

    def test_where_nothing_can_be_bad_it_is_refused(self):
        with pytest.raises(ValueError, match="the plan raises at the first step that is not finite"):
            run(program(classifier()), ff.rollback(after=1, every=1))

    def test_a_result_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match="on='spikes' is not a result of step 1, which has 'spike'"):
            run(
                program(classifier()),
                ff.folded("spike", ff.reducers.spikes()),
                ff.rollback(after=1, every=1, on="spikes"),
                ff.last,
            )

    @pytest.mark.parametrize("options", [{"after": 0, "every": 1}, {"after": 1, "every": 0}])
    def test_numbers_below_one_are_refused(self, options):
        with pytest.raises(ValueError, match="after and every must be integers of at least 1"):
            ff.rollback(**options)


def test_waiting_for_a_result_that_nobody_finds_is_told():
    made = program(classifier(), schedule=plateau(metric="evl_loss"))
    stages = (results([1.0, 2.0, 3.0]), ff.early_stopped("eval_los", patience=1), ff.until(steps=3), ff.last)
    with pytest.warns(UserWarning, match="which no observer found; they found 'eval_loss'") as caught:
        run(made, *stages)
    assert {str(one.message).split("'")[3] for one in caught} == {"evl_loss", "eval_los"}
