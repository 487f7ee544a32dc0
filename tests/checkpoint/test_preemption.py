"""A scheduler asks the run to end: it is saved at the next step boundary, and ends with the code of try again."""

import functools
import itertools
import os
import signal
import sys
import time

import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn import interrupt
from forgather_fn.checkpoint import latest, saved
from tests.checkpoint.faults import assert_same, forked, leaves
from tests.checkpoint.subjects import Drawing, Everything, drawing, everything, run_to

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STEPS = 8


@functools.cache
def states():
    """The uninterrupted run, by step."""
    program = everything()
    found = {0: leaves(program.init(0))}
    for tick in toolz.pipe(program.steps(program.init(0), drawing()), ff.until(steps=STEPS)):
        found[tick.state.step] = leaves(tick.state)
    return found


def hear(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


class Hearing(Everything):
    """Sends its process a signal in one of its forward passes, in training or in evaluation."""

    def __init__(self, number, *, forward, training=True):
        super().__init__()
        self.number, self.when, self.of_training, self.passed = number, forward, training, itertools.count()

    def forward(self, features):
        if self.training == self.of_training and next(self.passed) == self.when:
            hear(self.number)
        return super().forward(features)


def telling(writer):
    """Make an observer that writes a byte to a pipe."""

    def observe(tick):
        os.write(writer, b".")

    return observe


def train(run, *stages, model=Everything, data=None):
    program = everything(model=model)
    return run_to(STEPS, program, program.init(0), data or drawing(), *stages, ff.every(1000, saved(run)))


def check_saved(run, step):
    """Check that the run was saved at a step, to the bit, and ends as if it had not been interrupted."""
    assert latest(run).step == step
    program = everything()
    state = program.restore(run, allow={"model"})
    assert_same(leaves(state), states()[step])
    assert_same(leaves(run_to(STEPS, program, state, drawing())), states()[STEPS])


@pytest.mark.parametrize("number", SIGNALS)
class TestASignal:
    def test_in_an_observer(self, tmp_path, number):
        def child():
            train(tmp_path, ff.at(3, lambda tick: hear(number)))

        assert forked(child).code == interrupt.EXIT_CODE == 75
        check_saved(tmp_path, 3)

    @pytest.mark.parametrize(("forward", "step"), [(0, 0), (1, 1), (4, 2), (5, 3)])
    def test_in_a_forward_pass(self, tmp_path, number, forward, step):
        """In the first microbatch it ends the step, which consumes nothing; in the last, the step is finished."""

        def child():
            train(tmp_path, model=functools.partial(Hearing, number, forward=forward))

        assert forked(child).code == 75
        if step:
            check_saved(tmp_path, step)
        else:
            assert latest(tmp_path) is None

    def test_in_an_evaluation(self, tmp_path, number):
        seen = []

        def child():
            look = ff.every(2, ff.evaluated(drawing()), lambda tick: seen.append(dict(tick.results)))
            with pytest.raises(ff.Preempted) as caught:
                train(tmp_path, look, model=functools.partial(Hearing, number, forward=1, training=False))
            assert seen == [{}]
            raise caught.value

        assert forked(child).code == 75
        check_saved(tmp_path, 2)

    def test_before_the_first_step(self, tmp_path, number):
        def child():
            opening = ff.Observer(lambda tick: None, open=lambda steps: hear(number))
            train(tmp_path, ff.every(1, opening))

        assert forked(child).code == 75
        assert latest(tmp_path) is None

    def test_while_a_batch_is_fetched(self, tmp_path, number):
        class Heard(Drawing):
            def __getitem__(self, index):
                if index == 3:
                    hear(number)
                return super().__getitem__(index)

        def child():
            train(tmp_path, data=ff.batches(Heard(), batch_size=6, collate=drawing().collate, random=True))

        assert forked(child).code == 75
        check_saved(tmp_path, latest(tmp_path).step)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_of_another_process(self, tmp_path, number, workers):
        reader, writer = os.pipe()

        def child():
            program = everything()
            tell = ff.at(2, telling(writer))
            endless = ff.every(1, lambda tick: time.sleep(0.005))
            data = drawing(workers=workers)
            run_to(100_000, program, program.init(0), data, tell, endless, ff.every(5000, saved(tmp_path)))

        def send(child):
            os.read(reader, 1)
            os.kill(child, number)

        assert forked(child, meanwhile=send).code == 75
        os.close(reader)
        os.close(writer)
        step = latest(tmp_path).step
        assert step >= 2
        program = everything()
        expected = leaves(run_to(step, program, program.init(0), drawing()))
        assert_same(leaves(program.restore(tmp_path)), expected)

    def test_a_second_time_ends_the_process_at_once(self, tmp_path, number):
        def child():
            def twice(tick):
                hear(number)
                hear(number)
                os._exit(1)

            train(tmp_path, ff.every(2, saved(tmp_path / "other", async_=False)), ff.at(4, twice))

        assert forked(child).code == -number
        assert latest(tmp_path) is None
        assert latest(tmp_path / "other").step == 4

    def test_handlers_are_put_back(self, tmp_path, number):
        def child():
            heard = []

            def mine(number, frame):
                heard.append(number)

            for one in SIGNALS:
                signal.signal(one, mine)
            with pytest.raises(ff.Preempted) as caught:
                train(tmp_path, ff.at(3, lambda tick: hear(number)))
            assert (caught.value.code, caught.value.signal) == (75, number)
            assert [signal.getsignal(one) for one in SIGNALS] == [mine, mine]
            assert heard == []
            hear(number)
            return heard

        assert forked(child).value == [number]

    def test_to_the_whole_group_with_its_workers(self, tmp_path, number):
        """As the schedulers of many clusters send it."""
        reader, writer = os.pipe()

        def child():
            os.setsid()
            program = everything()
            tell = ff.at(2, telling(writer))
            slowly = ff.every(1, lambda tick: time.sleep(0.01))
            run_to(2000, program, program.init(0), drawing(workers=2), tell, slowly, ff.every(5000, saved(tmp_path)))

        def send(child):
            os.read(reader, 1)
            os.killpg(child, number)

        ended = forked(child, meanwhile=send)
        os.close(reader)
        os.close(writer)
        assert ended.code == 75
        assert latest(tmp_path).step >= 2


class Handlers(Drawing):
    """Tells in each sample whether its process has the handlers of the run."""

    def __getitem__(self, index):
        inherited = [signal.getsignal(number) is interrupt._note for number in (signal.SIGINT, *SIGNALS)]
        return torch.tensor([float(any(inherited)), float(os.getpid()), 0, 0, 0]), index % 3


def test_worker_processes_do_not_inherit_the_handlers():
    def child():
        program = everything()
        data = ff.batches(Handlers(), batch_size=6, workers=2)
        batches = [tick.batch.data[0] for tick in toolz.pipe(program.steps(program.init(0), data), ff.until(steps=4))]
        rows = torch.cat(batches)
        assert os.getpid() not in rows[:, 1].tolist()
        return rows[:, 0].sum()

    assert forked(child).value == 0


def test_ctrl_c_saves_and_ends_normally(tmp_path):
    def child():
        state = train(tmp_path, ff.at(3, lambda tick: hear(signal.SIGINT)))
        return state.step

    assert forked(child).value == 3
    check_saved(tmp_path, 3)


def test_ctrl_c_twice_ends_at_once_and_leaves_the_older_ones(tmp_path):
    def child():
        def twice(tick):
            hear(signal.SIGINT)
            hear(signal.SIGINT)

        try:
            train(tmp_path, ff.every(2, saved(tmp_path / "other")), ff.at(4, twice))
        except KeyboardInterrupt:
            sys.exit(130)

    assert forked(child).code == 130
    assert latest(tmp_path) is None
    assert latest(tmp_path / "other").step == 4


def test_a_save_that_fails_then_is_an_error(tmp_path):
    def child():
        from forgather_fn.checkpoint import SaveError, system

        def full(path):
            return 0

        system.free_bytes = full
        try:
            train(tmp_path, ff.at(3, lambda tick: hear()))
        except SaveError:
            return "told"

    assert forked(child).value == "told"


def test_a_preemption_while_a_save_is_written_waits_for_it(tmp_path):
    def child():
        from forgather_fn.checkpoint import system

        write = system.write

        def slow(file, data):
            time.sleep(0.002)
            return write(file, data)

        system.write = slow
        train(tmp_path, ff.every(3, saved(tmp_path / "other")), ff.at(3, lambda tick: hear()))

    assert forked(child).code == 75
    check_saved(tmp_path, 3)
    check_saved(tmp_path / "other", 3)
