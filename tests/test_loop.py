import itertools

import attrs
import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.loop import Demand, Steps
from tests.toys import Noisy, assert_equal, classifier, labelled, labelled_batches, program, trained, unchanged


@pytest.fixture
def made():
    return program(Noisy())


class TestSteps:
    def test_a_run_is_a_fold_of_the_step(self, made):
        state = made.init(0)
        kept = state.copy()
        ticks = []
        for tick in made.steps(state, labelled_batches(4)):
            ticks.append((tick.state.step, tick.state.samples, float(tick.metrics["loss"])))
        assert [ticks[0][:2], ticks[-1][:2]] == [(1, 6), (4, 24)]
        assert_equal(tick.state, ff.fold(made.step, kept, labelled_batches(4)))

    def test_a_tick_knows_its_batch_and_its_run(self, made):
        state, _ = made.step(made.init(0), labelled(6))
        data = labelled_batches(2)
        ticks = list(made.steps(state, data))
        assert [tick.batch is batch for tick, batch in zip(ticks, data, strict=True)] == [True, True]
        assert ticks[0].run is ticks[1].run
        assert (ticks[0].run.data, ticks[0].run.started, ticks[0].run.horizon) == (data, 1, None)
        assert ticks[0].run.program is made
        assert ticks[0].run.epoch(6) is None
        assert dict(ticks[0].results) == {}

    def test_nothing_is_fetched_before_it_is_asked_for(self, made):
        fetched = []
        steps = made.steps(made.init(0), (fetched.append(i) or labelled(6) for i in range(5)))
        stage = toolz.pipe(steps, ff.every(1, lambda tick: None), ff.until(steps=3))
        assert fetched == []
        iterator = iter(stage)
        next(iterator)
        assert fetched == [0]
        iterator.close()

    def test_data_of_any_kind_that_can_be_iterated(self, made):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*labelled(12)), batch_size=6)
        state = ff.last(made.steps(made.init(0), loader))
        assert_equal(state, trained(Noisy(), [pair(0, 6), pair(6, 12)]))

    def test_a_stream_that_is_consumed_cannot_be_run_again(self, made):
        steps = made.steps(made.init(0), labelled_batches(2))
        ff.last(steps)
        with pytest.raises(ff.ConsumedStateError):
            list(steps)

    def test_no_data_gives_the_state_itself(self, made):
        state = made.init(0)
        assert ff.last(made.steps(state, [])) is state

    def test_a_fetch_that_fails_consumes_nothing(self, made):
        def batches():
            yield labelled(6)
            raise OSError("the disk is gone")

        seen = []
        with pytest.raises(OSError, match="the disk is gone"):
            toolz.pipe(made.steps(made.init(0), batches()), ff.every(1, lambda tick: seen.append(tick.state)), ff.last)
        assert not seen[0].consumed
        assert_equal(made.step(seen[0], labelled(6, seed=1))[0], trained(Noisy(), labelled_batches(2)))

    def test_a_step_that_fails_consumes_nothing(self, made):
        features, labels = labelled(6)
        seen = []
        with pytest.raises(ff.NonFiniteError, match="step 1"):
            toolz.pipe(
                made.steps(made.init(0), [(features, labels), (features / 0, labels)]),
                ff.every(1, lambda tick: seen.append(tick.state)),
                ff.last,
            )
        with unchanged(seen[0]):
            assert seen[0].step == 1


def begun(seed=0):
    return program(Noisy()).init(seed)


def pair(start, stop):
    features, labels = labelled(12)
    return features[start:stop], labels[start:stop]


def data(**changes):
    features, labels = labelled(20)
    return ff.batches((features, labels), **({"batch_size": 6} | changes))


class TestStreams:
    @pytest.mark.parametrize("last", ["span", "ragged", "drop"])
    def test_a_run_that_is_cut_goes_on_to_the_bit(self, made, last):
        whole = toolz.pipe(made.steps(made.init(3), data(last=last)), ff.until(steps=9), ff.last)
        for cut in (1, 4, 8):
            other = program(Noisy())
            first = toolz.pipe(other.steps(other.init(3), data(last=last)), ff.until(steps=cut), ff.last)
            fresh = program(Noisy())
            fresh.init(0)
            state = toolz.pipe(fresh.steps(first.copy(), data(last=last)), ff.until(steps=9), ff.last)
            assert_equal(state, whole)

    def test_another_stream_than_before_is_refused_with_both_sides(self, made):
        state = toolz.pipe(made.steps(made.init(0), data()), ff.until(steps=2), ff.last)
        with pytest.raises(
            ValueError, match=r"(?s)another stream.*the state: .*shuffled.*the stream: .*sequential.*evolve"
        ):
            made.steps(state, data(order="sequential"))
        moved = attrs.evolve(state, data=None, samples=0)
        assert toolz.pipe(made.steps(moved, data(order="sequential")), ff.until(steps=3), ff.last).samples == 6

    def test_another_batch_size_is_refused_with_both_sides(self, made):
        state = toolz.pipe(made.steps(made.init(0), data()), ff.until(steps=2), ff.last)
        with pytest.raises(ValueError, match=r"batch_size=6, the stream has batch_size=4"):
            made.steps(state, data(batch_size=4))
        moved = attrs.evolve(state, batch_size=None)
        assert toolz.pipe(made.steps(moved, data(batch_size=4)), ff.until(steps=3), ff.last).samples == 16

    def test_the_seed_of_the_run_orders_the_data(self, made):
        def order(seed):
            return [tick.batch.indices.tolist() for tick in ff.until(steps=4)(made.steps(made.init(seed), data()))]

        assert order(0) == order(0) != order(1)

    def test_more_microbatches_than_samples_in_a_batch_are_refused_before_the_first_step(self):
        made = program(Noisy(), microbatches=7)
        with pytest.raises(ValueError, match="microbatches=7, but batch_size=6"):
            made.steps(made.init(0), data())

    def test_the_last_batch_of_an_epoch_may_have_fewer_samples_than_microbatches(self):
        made = program(classifier(), microbatches=4)
        state = toolz.pipe(made.steps(made.init(0), data(last="ragged")), ff.until(epochs=1), ff.last)
        assert (state.step, state.samples) == (4, 20)

    def test_epochs_are_counted_in_samples(self, made):
        ticks = list(ff.until(steps=5)(made.steps(made.init(0), data())))
        assert ticks[-1].run.epoch(ticks[-1].state.samples) == 1.5

    def test_the_stream_is_closed_with_the_run(self, made):
        closed = []

        def batches():
            try:
                for seed in itertools.count():
                    yield labelled(6, seed=seed)
            finally:
                closed.append(True)

        toolz.pipe(made.steps(made.init(0), batches()), ff.until(steps=2), ff.last)
        assert closed == [True]


class TestDemands:
    def test_wants_are_joined_and_the_earliest_end_counts(self):
        demand = (
            Demand().wanting(lambda step: frozenset({"a"} if step % 2 else ())).wanting(lambda step: frozenset({"b"}))
        )
        assert demand.at(1) == {"a", "b"}
        assert demand.at(2) == {"b"}
        assert Demand().ending(None).horizon is None
        assert Demand().ending(5).ending(None).ending(3).horizon == 3
        assert Demand().at(1) == frozenset()

    def test_demands_reach_the_source_when_it_is_opened(self):
        demands = []

        def opened(demand):
            demands.append(demand)
            return iter(())

        toolz.pipe(Steps(begun(), [], opened), ff.at(3, ff.Observer(lambda tick: None, wants=frozenset({"x"}))), list)
        assert [demands[0].at(step) for step in (2, 3, 4)] == [frozenset(), {"x"}, frozenset()]


class TestFold:
    def test_it_can_be_cut_anywhere(self, made):
        state = made.init(0)
        copies = [state.copy() for _ in range(4)]
        whole = ff.fold(made.step, state, labelled_batches(4))
        for cut, begun in enumerate(copies):
            parts = labelled_batches(4)[:cut], labelled_batches(4)[cut:]
            assert_equal(ff.fold(made.step, ff.fold(made.step, begun, parts[0]), parts[1]), whole)

    def test_a_stream_says_how_it_is_folded_over(self, made):
        stream = ff.batches(labelled(8), batch_size=4)
        with pytest.raises(TypeError, match=r"stream\.start\(seed=0, samples=0\)"):
            ff.fold(made.step, made.init(0), stream)

    def test_nothing_to_fold_gives_the_state_itself(self, made):
        state = made.init(0)
        assert ff.fold(made.step, state, []) is state
