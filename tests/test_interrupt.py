import itertools
import os
import signal
import threading

import pytest
import toolz

import forgather_fn as ff
from tests.toys import assert_equal, classifier, labelled, labelled_batches, program, trained


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.fixture
def made():
    return program(classifier())


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def interrupting(*steps):
    return lambda tick: interrupt() if tick.state.step in steps else None


class TestTheFirst:
    def test_in_an_observer_ends_the_stream_after_the_tick(self, made):
        seen, fetched = [], []

        def batches():
            for seed in itertools.count():
                fetched.append(seed)
                yield labelled(6, seed=seed)

        state = toolz.pipe(
            made.steps(made.init(0), batches()),
            ff.every(1, interrupting(3)),
            ff.every(1, lambda tick: seen.append(tick.state.step)),
            ff.at_end(lambda tick: seen.append("end")),
            ff.last,
        )
        assert (state.step, seen, fetched) == (3, [1, 2, 3, "end"], [0, 1, 2])
        assert_equal(state, trained(classifier(), labelled_batches(3)))

    def test_in_the_data_ends_the_stream_after_the_step_that_it_is_for(self, made):
        def batches():
            for seed in itertools.count():
                if seed == 2:
                    interrupt()
                yield labelled(6, seed=seed)

        assert ff.last(made.steps(made.init(0), batches())).step == 3

    def test_in_forward_lets_the_step_finish(self):
        model = classifier()
        calls = []

        def hook(module, args):
            calls.append(1)
            if len(calls) == 2:
                interrupt()

        model.register_forward_pre_hook(hook)
        made = program(model)
        state = ff.last(made.steps(made.init(0), labelled_batches(5)))
        assert_equal(state, trained(classifier(), labelled_batches(2)))

    def test_in_a_loop_of_ones_own(self, made):
        seen = []
        for tick in made.steps(made.init(0), labelled_batches(5)):
            seen.append(tick.state.step)
            interrupting(2)(tick)
        assert seen == [1, 2]

    def test_says_what_happens_and_how_to_end_at_once(self, made, capsys):
        toolz.pipe(made.steps(made.init(0), labelled_batches(5)), ff.every(1, interrupting(1)), ff.last)
        said = capsys.readouterr().err
        assert "stopping after this step" in said
        assert "again: at once" in said

    def test_the_state_can_go_on(self, made):
        state = toolz.pipe(made.steps(made.init(0), labelled_batches(5)), ff.every(1, interrupting(1)), ff.last)
        state = ff.last(made.steps(state, labelled_batches(3)[1:]))
        assert_equal(state, trained(classifier(), labelled_batches(3)))

    def test_in_an_inner_run_ends_the_outer_one_too(self, made):
        inner, seen = program(classifier()), []

        def probe(tick):
            steps = toolz.pipe(inner.steps(inner.init(0), labelled_batches(4)), ff.every(1, interrupting(2)))
            seen.append(ff.last(steps).step)

        state = toolz.pipe(made.steps(made.init(0), labelled_batches(3)), ff.every(1, probe), ff.last)
        assert (state.step, seen) == (1, [2])


class TestTheSecond:
    def test_raises_at_once(self, made):
        closed, ended = [], []

        def twice(tick):
            interrupt()
            interrupt()
            pytest.fail("the second signal did not raise")

        observer = ff.Observer(twice, close=lambda: closed.append(True))
        with pytest.raises(KeyboardInterrupt):
            toolz.pipe(
                made.steps(made.init(0), labelled_batches(5)),
                ff.at_end(lambda tick: ended.append(tick)),
                ff.every(2, observer),
                ff.last,
            )
        assert closed == [True]
        assert ended == []

    def test_in_forward_consumes_nothing(self):
        model = classifier()
        made = program(model)
        state, _ = made.step(made.init(0), labelled(6))

        def twice(module, args):
            interrupt()
            interrupt()

        hook = model.register_forward_pre_hook(twice)
        with pytest.raises(KeyboardInterrupt):
            list(made.steps(state, [labelled(6, seed=1)]))
        hook.remove()
        assert not state.consumed
        assert_equal(made.step(state, labelled(6, seed=1))[0], trained(classifier(), labelled_batches(2)))


class TestHandlers:
    def test_outside_a_run_signals_are_as_before(self, made):
        steps = made.steps(made.init(0), labelled_batches(2))
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        iterator = iter(steps)
        next(iterator)
        iterator.close()
        with pytest.raises(KeyboardInterrupt):
            interrupt()

    def test_a_signal_of_one_run_does_not_end_the_next(self, made):
        state = toolz.pipe(made.steps(made.init(0), labelled_batches(5)), ff.every(1, interrupting(1)), ff.last)
        assert ff.last(made.steps(state, labelled_batches(3))).step == 4

    def test_a_handler_of_the_users_own_is_left_alone(self, made):
        heard = []
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        try:
            state = toolz.pipe(made.steps(made.init(0), labelled_batches(3)), ff.every(1, interrupting(1)), ff.last)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        assert (state.step, heard) == (3, [signal.SIGINT])

    def test_a_run_in_another_thread_leaves_them_alone(self, made):
        results = []

        def run():
            results.append(ff.last(made.steps(made.init(0), labelled_batches(3))).step)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert results == [3]

    @pytest.mark.parametrize("order", ["first", "second"])
    def test_two_runs_side_by_side_leave_no_handler_behind(self, order):
        programs = [program(classifier()) for _ in range(2)]
        runs = [iter(made.steps(made.init(0), labelled_batches(3))) for made in programs]
        for run in runs:
            next(run)
        for run in runs if order == "first" else reversed(runs):
            run.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_they_are_put_back_after_an_exception(self, made):
        def fail(tick):
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            toolz.pipe(made.steps(made.init(0), labelled_batches(3)), ff.every(1, fail), ff.last)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class TestPreemption:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_it_ends_the_run_with_its_last_tick_and_the_code_of_try_again(self, made, number):
        ended = []
        with pytest.raises(ff.Preempted) as caught:
            toolz.pipe(
                made.steps(made.init(0), labelled_batches(5)),
                ff.every(1, lambda tick: interrupt(number) if tick.state.step == 2 else None),
                ff.at_end(lambda tick: ended.append(tick.state.step)),
                ff.last,
            )
        assert (caught.value.code, caught.value.signal, ended) == (75, number, [2])

    def test_a_step_that_it_cuts_short_consumes_nothing(self):
        model = classifier()
        made, ended = program(model, microbatches=3), []
        calls = []

        def hook(module, args):
            calls.append(1)
            if len(calls) == 4:
                interrupt(signal.SIGTERM)

        model.register_forward_pre_hook(hook)
        with pytest.raises(ff.Preempted):
            toolz.pipe(
                made.steps(made.init(0), labelled_batches(5)), ff.at_end(lambda tick: ended.append(tick.state)), ff.last
            )
        assert len(calls) == 4
        assert_equal(ended[0], trained(classifier(), labelled_batches(1), microbatches=3))
