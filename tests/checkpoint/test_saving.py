import errno
import itertools
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import attrs
import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.checkpoint import SaveError, latest, list_checkpoints, save, saved, system
from forgather_fn.checkpoint import saving as saving_module
from forgather_fn.checkpoint.snapshot import Memory
from forgather_fn.state import counter
from tests.checkpoint.faults import Calls, at, content, failing, from_then_on, names
from tests.checkpoint.subjects import BATCHES, STEPS, drawing, everything, finished, run_to, small, trajectory
from tests.specimens import mlp
from tests.toys import assert_equal, labelled_batches

PATIENCE = 30.0
"""Seconds after which something that should have happened has not. No test that passes waits for it."""


@pytest.fixture
def program():
    return small()


def trained(program, *stages, batches=BATCHES):
    """Run over the batches from the start, under stages."""
    return toolz.pipe(program.steps(program.init(0), batches), *stages, ff.last)


def steps(run):
    return [entry.step for entry in list_checkpoints(run)]


def files(run):
    """Give the hash of every file, by step; the manifests, which know the time, are not compared."""
    return {entry.step: {n: f.sha256 for n, f in entry.manifest.files.items()} for entry in list_checkpoints(run)}


def wait_for(event):
    assert event.wait(PATIENCE), "it did not happen"


class TestSave:
    def test_gives_the_directory_and_leaves_the_state(self, program, tmp_path):
        state = program.init(0)
        home = save(program, state, str(tmp_path))
        assert home == tmp_path / "checkpoints" / "checkpoint-0"
        assert_equal(program.restore(home), state)
        assert_equal(finished(program, state), trajectory()[STEPS])

    def test_of_a_consumed_state_is_refused(self, program, tmp_path):
        state = program.init(0)
        program.step(state, BATCHES[0])
        with pytest.raises(ff.ConsumedStateError):
            save(program, state, tmp_path)

    def test_of_a_state_that_is_not_finite_is_refused(self, program, tmp_path):
        state = program.init(0)
        arrays = attrs.evolve(state.read(), nonfinite=counter(3, torch.device("cpu")))
        with pytest.raises(ff.NonFiniteError, match="step 3"):
            save(program, attrs.evolve(state, arrays=arrays), tmp_path)
        assert not (tmp_path / "checkpoints").exists()

    def test_again_takes_the_place_of_the_first(self, program, tmp_path):
        program.init(0)
        save(program, trajectory()[2], tmp_path)
        other, _ = program.step(trajectory()[1].copy(), BATCHES[-1])
        save(program, other, tmp_path)
        assert names(tmp_path) == ["checkpoint-2"]
        assert_equal(program.restore(tmp_path), other)


class TestAsynchronously:
    def test_training_goes_on_while_a_save_is_written(self, program, tmp_path):
        going_on, seen = threading.Event(), []

        def slow(call, perform):
            wait_for(going_on)
            return perform()

        def release(tick):
            seen.append(latest(tmp_path))
            going_on.set()

        with Calls(lambda number: slow if number > 4 else None).watched():
            state = trained(program, ff.at(1, saved(tmp_path)), ff.at(5, release))
        assert seen == [None]
        assert steps(tmp_path) == [1, STEPS]
        assert_equal(state, trajectory()[STEPS])

    def test_only_the_update_waits_for_the_copy(self, tmp_path, monkeypatch):
        """The copy waits for the next forward pass and a little longer: an update that did not wait would be first."""
        model = mlp()
        program = small(model=model)
        forward, events = threading.Event(), []

        def late(state, *rest, take=saving_module.snapshot):
            taken, copy = take(state, *rest)

            def copy_late():
                wait_for(forward)
                time.sleep(0.05)
                copy()
                events.append("copied")

            return taken, copy_late

        def hook(module, args):
            events.append("forward")
            forward.set()

        monkeypatch.setattr(saving_module, "snapshot", late)
        state = program.init(0)
        first, _ = program.step(state.copy(), BATCHES[0])
        stream = ff.at(1, saved(tmp_path))(program.steps(state, BATCHES[:3]))
        ticks = iter(stream)
        next(ticks)
        model.register_forward_pre_hook(hook)
        assert next(ticks).state.step == 2
        assert events == ["forward", "copied"]
        del ticks
        assert_equal(program.restore(tmp_path / "checkpoints" / "checkpoint-1"), first)

    def test_writes_what_a_synchronous_save_writes(self, tmp_path, monkeypatch):
        def late(*given, take=saving_module.snapshot):
            taken, copy = take(*given)

            def copy_late():
                time.sleep(0.01)
                copy()

            return taken, copy_late

        for async_ in (True, False):
            program = everything()
            run_to(6, program, program.init(0), drawing(), ff.every(1, saved(tmp_path / str(async_), async_=async_)))
            monkeypatch.setattr(saving_module, "snapshot", late)
        assert steps(tmp_path / "True") == [1, 2, 3, 4, 5, 6]
        assert files(tmp_path / "True") == files(tmp_path / "False")

    @pytest.mark.parametrize("async_", [True, False])
    def test_changes_nothing(self, tmp_path, async_):
        one, other = everything(), everything()
        expected = run_to(12, one, one.init(0), drawing())
        state = run_to(12, other, other.init(0), drawing(), ff.every(1, saved(tmp_path, keep=2, async_=async_)))
        assert_equal(state, expected)

    def test_one_save_is_written_at_a_time(self, program, tmp_path):
        with Calls().watched(writers=2) as calls:
            trained(program, ff.every(1, saved(tmp_path)))
        homes = [part for call in calls.made for part in call.path.parts if part.startswith(".tmp")]
        changes = sum(one != other for one, other in itertools.pairwise(homes))
        assert changes == len(set(homes)) - 1 == STEPS - 1

    def test_host_memory_is_used_again(self):
        memory, tensor = Memory(), torch.ones(3)
        first = memory.like("a", tensor)
        assert memory.like("a", tensor) is first
        assert memory.like("b", tensor) is not first
        assert memory.like("a", torch.ones(4)).shape == (4,)
        assert memory.like("a", torch.ones(4, dtype=torch.int64)).dtype == torch.int64

    def test_a_save_that_is_not_asynchronous_is_there_at_once(self, program, tmp_path):
        seen = []
        trained(program, ff.every(2, saved(tmp_path, async_=False), lambda tick: seen.append(latest(tmp_path).step)))
        assert seen == [2, 4, 6, 8]

    def test_a_copy_that_fails_is_a_failure_and_holds_up_nothing(self, program, tmp_path, monkeypatch):
        def broken(*given, take=saving_module.snapshot):
            def copy():
                raise MemoryError("planted")

            return take(*given)[0], copy

        monkeypatch.setattr(saving_module, "snapshot", broken)
        with pytest.raises(SaveError, match="MemoryError: planted"):
            trained(program, ff.at(1, saved(tmp_path)))


class TestTheEnd:
    def test_is_saved_where_the_last_look_was_before_it(self, program, tmp_path):
        trained(program, ff.every(3, saved(tmp_path)))
        assert steps(tmp_path) == [3, 6, 8]
        assert_equal(program.restore(tmp_path), trajectory()[STEPS])

    def test_is_saved_once(self, program, tmp_path):
        with Calls().watched() as calls:
            trained(program, ff.every(4, saved(tmp_path)))
        assert steps(tmp_path) == [4, 8]
        assert sum(call.name == "make_directory" and ".tmp" in call.path.name for call in calls.made) == 2

    def test_of_a_run_without_a_step_saves_nothing(self, program, tmp_path):
        trained(program, ff.every(1, saved(tmp_path)), batches=[])
        assert steps(tmp_path) == []

    def test_by_an_exception_saves_nothing_more(self, program, tmp_path):
        def fail(tick):
            if tick.state.step == 5:
                raise KeyError("planted")

        with pytest.raises(KeyError):
            trained(program, ff.every(2, saved(tmp_path)), ff.every(1, fail))
        assert steps(tmp_path) == [2, 4]

    def test_by_another_stage_is_saved(self, program, tmp_path):
        trained(program, ff.every(4, saved(tmp_path)), ff.until(steps=3))
        assert steps(tmp_path) == [3]

    def test_in_a_loop_that_is_left_is_saved(self, program, tmp_path):
        for tick in ff.every(5, saved(tmp_path))(program.steps(program.init(0), BATCHES)):
            if tick.state.step == 3:
                break
        del tick
        assert steps(tmp_path) == [3]

    def test_of_a_second_run_of_one_observer_is_saved_too(self, program, tmp_path):
        stage = ff.every(5, saved(tmp_path))
        trained(program, stage, batches=BATCHES[:3])
        other, _ = program.step(ff.fold(program.step, program.init(0), BATCHES[:2]), BATCHES[5])
        with pytest.warns(UserWarning, match="of an earlier training"):
            trained(program, stage, batches=[*BATCHES[:2], BATCHES[5]])
        assert_equal(program.restore(tmp_path), other)

    def test_is_waited_for(self, program, tmp_path):
        def slow(call, perform):
            time.sleep(0.002)
            return perform()

        with Calls(from_then_on(0, slow)).watched():
            trained(program, ff.every(4, saved(tmp_path)))
        assert steps(tmp_path) == [4, 8]
        assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


class TestARunThatHoldsCheckpoints:
    def test_of_another_training_is_told_when_the_stream_begins(self, program, tmp_path):
        trained(program, ff.every(4, saved(tmp_path)))
        stage = ff.every(100, saved(tmp_path))
        ticks = iter(stage(program.steps(program.init(1), BATCHES)))
        with pytest.warns(
            UserWarning, match=r"checkpoints up to step 8 of an earlier training, .*program\.restore\(run"
        ):
            next(ticks)
        ticks.close()

    def test_as_an_error_gives_the_lock_up(self, program, tmp_path):
        trained(program, ff.every(4, saved(tmp_path)))
        with pytest.raises(UserWarning, match="of an earlier training"):
            trained(program, ff.every(4, saved(tmp_path)))
        toolz.pipe(program.steps(program.restore(tmp_path), BATCHES), ff.every(4, saved(tmp_path)), ff.last)

    def test_that_is_gone_on_from_is_no_news(self, program, tmp_path, recwarn):
        trained(program, ff.every(4, saved(tmp_path)), ff.until(steps=6))
        toolz.pipe(program.steps(program.restore(tmp_path), BATCHES[6:]), ff.every(4, saved(tmp_path)), ff.last)
        assert steps(tmp_path) == [4, 6, 8]
        assert not recwarn.list

    def test_that_went_back_to_one_of_them_is_no_news(self, program, tmp_path, recwarn):
        trained(program, ff.every(2, saved(tmp_path)))
        earlier = program.restore(tmp_path / "checkpoints" / "checkpoint-4")
        toolz.pipe(program.steps(earlier, BATCHES[4:]), ff.every(1, saved(tmp_path)), ff.until(steps=5), ff.last)
        toolz.pipe(program.steps(program.restore(tmp_path), BATCHES[5:]), ff.every(4, saved(tmp_path)), ff.last)
        assert steps(tmp_path) == [2, 4, 6, 5, 8]
        assert not recwarn.list

    def test_from_which_weights_alone_are_taken_is_no_news_where_that_is_said(self, program, tmp_path, recwarn):
        trained(program, ff.every(4, saved(tmp_path)))
        state = program.restore(tmp_path, without={"progress"})
        stage = ff.every(4, saved(tmp_path, resumed_from=tmp_path))
        toolz.pipe(program.steps(state, BATCHES), stage, ff.until(steps=2), ff.last)
        assert not recwarn.list


class TestStages:
    @pytest.mark.parametrize("async_", [True, False])
    @pytest.mark.parametrize(
        ("last", "found"), [(ff.at_end, [1, 4, STEPS]), (partial(ff.every, 3), [1, 3, 4, 6, STEPS])]
    )
    def test_one_observer_may_stand_in_several(self, program, tmp_path, async_, last, found):
        saver = saved(tmp_path / "run", async_=async_)
        trained(program, ff.at(1, saver), last(saver), ff.at(4, saver))
        assert steps(tmp_path / "run") == found
        assert_equal(program.restore(tmp_path / "run"), trajectory()[STEPS])
        again = program.steps(program.restore(tmp_path / "run"), BATCHES)
        toolz.pipe(again, ff.every(4, saved(tmp_path / "run")), ff.last)  # the lock was given up

    def test_two_of_them_tell_of_their_failures_together(self, program, tmp_path):
        seen = []
        a, b = (saved(tmp_path / name, failures=9, async_=False) for name in "ab")
        note = ff.every(1, lambda tick: seen.append(tick.results["save_failures"]))
        with (
            Calls(lambda number: full).watched(),
            pytest.raises(SaveError, match=r"9 saves to .*a in a row have failed"),
        ):
            trained(program, ff.every(1, a), ff.every(2, b, a), note)
        assert seen == [1, 2, 4, 5, 7, 8]

    def test_but_not_in_two_streams_at_a_time(self, program, tmp_path):
        saver = saved(tmp_path)
        first, second = (iter(ff.every(1, saver)(program.steps(program.init(0), BATCHES))) for _ in range(2))
        next(first)
        with pytest.raises(ValueError, match=r"looks at two streams at a time.*give each an observer, and a run"):
            next(second)
        first.close()


class TestResults:
    def test_of_observers_before_it_are_kept_with_it(self, program, tmp_path):
        found = {2: 0.5, 4: math.nan, 6: 0.0}
        observe = ff.every(2, lambda tick: {"eval_loss": found.get(tick.state.step, math.inf)}, saved(tmp_path))
        trained(program, observe)
        metrics = [entry.manifest.metrics["eval_loss"] for entry in list_checkpoints(tmp_path)]
        assert (metrics[0], math.isnan(metrics[1]), *metrics[2:]) == (0.5, True, 0.0, math.inf)

    def test_of_an_evaluation_choose_the_best(self, program, tmp_path):
        losses = {2: 0.4, 4: 0.1, 6: 0.1, 8: 0.3}
        trained(
            program,
            ff.every(2, lambda tick: {"eval_loss": losses[tick.state.step]}, saved(tmp_path, keep=1, best="eval_loss")),
        )
        assert steps(tmp_path) == [4, 8]

    def test_where_greater_is_better(self, program, tmp_path):
        scores = {2: 0.4, 4: 0.1, 6: 0.1, 8: 0.3}
        observer = saved(tmp_path, keep=1, best="score", greater_is_better=True)
        trained(program, ff.every(2, lambda tick: {"score": scores[tick.state.step]}, observer))
        assert steps(tmp_path) == [2, 8]

    def test_a_best_that_is_misspelt_is_named_at_the_end(self, program, tmp_path):
        look = ff.every(
            2, lambda tick: {"x": 1.0, "eval_loss": 1.0 / tick.state.step}, saved(tmp_path, best="eval_los")
        )
        with pytest.warns(UserWarning, match="'saved' waited for a result named 'eval_los', .* they found 'eval_loss'"):
            trained(program, look)

    def test_a_best_that_is_found_when_it_is_too_late_is_told_too(self, program, tmp_path):
        late = ff.every(2, saved(tmp_path, best="eval_loss"), lambda tick: {"eval_loss": 1.0})
        with pytest.warns(UserWarning, match="no checkpoint has this result, .* evaluate in the same stage, before"):
            trained(program, late)

    def test_a_best_where_nothing_was_found_is_told(self, program, tmp_path):
        with pytest.warns(
            UserWarning, match="'saved' waited for a result named 'loss', .* is a metric of the step"
        ) as told:
            trained(program, ff.every(2, saved(tmp_path, best="loss")))
        assert len(told) == 1

    def test_a_best_of_the_run_that_went_on_is_enough(self, program, tmp_path, recwarn):
        found = ff.every(2, lambda tick: {"x": 1.0}, saved(tmp_path, best="x"))
        trained(program, found, ff.until(steps=4))
        again = ff.every(2, saved(tmp_path, best="x"))
        toolz.pipe(program.steps(program.restore(tmp_path), BATCHES[4:]), again, ff.last)
        assert not recwarn.list

    @pytest.mark.parametrize("found", [[{"x": 1.0, "eval_loss": 1.0}, {"x": 1.0}], [{"eval_loss": math.nan}]])
    def test_otherwise_there_is_no_warning(self, program, tmp_path, found, recwarn):
        results = iter(found)
        look = ff.every(2, lambda tick: next(results, {}), saved(tmp_path, best="eval_loss"))
        trained(program, look)
        assert not recwarn.list


class TestKeep:
    @pytest.mark.parametrize(("keep", "left"), [(None, [2, 4, 6, 8]), (1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
    def test_says_how_many_stay(self, program, tmp_path, keep, left):
        trained(program, ff.every(2, saved(tmp_path, keep=keep)))
        assert steps(tmp_path) == left
        assert names(tmp_path) == [f"checkpoint-{step}" for step in left]

    def test_a_pinned_one_stays(self, program, tmp_path):
        program.init(0)
        state = trajectory()[1]
        save(program, state, tmp_path, pinned=True)
        toolz.pipe(program.steps(state.copy(), BATCHES[1:]), ff.every(2, saved(tmp_path, keep=1)), ff.last)
        assert steps(tmp_path) == [1, 8]

    @pytest.mark.parametrize("kind", ["checkpoint", "relative", "link", "run"])
    def test_the_one_resumed_from_stays(self, program, tmp_path, monkeypatch, kind):
        run = tmp_path / "run"
        program.init(0)
        for step in (1, 2):
            home = save(program, trajectory()[step], run)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(run)
        ways = {
            "checkpoint": home,
            "relative": "run/../run/checkpoints/checkpoint-2",
            "link": tmp_path / "link" / "checkpoints" / "checkpoint-2",
            "run": run,
        }
        state = program.restore(ways[kind])
        observer = saved("run", keep=1, resumed_from=ways[kind])
        toolz.pipe(program.steps(state, BATCHES[2:]), ff.every(2, observer), ff.last)
        assert steps(run) == [2, 8]

    def test_of_less_than_one_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"saved: keep must be an integer of at least 1, or None.*; got 0"):
            saved(tmp_path, keep=0)
        with pytest.raises(ValueError, match="saved: failures must be an integer of at least 1; got 0"):
            saved(tmp_path, failures=0)

    def test_of_a_checkpoint_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"saved: resumed_from='nowhere': there is no checkpoint"):
            saved(tmp_path, resumed_from="nowhere")

    def test_one_that_cannot_be_removed_is_no_failure_and_goes_the_next_time(self, program, tmp_path, caplog):
        with Calls().watched() as calls:
            trained(program, ff.every(2, saved(tmp_path / "a", keep=1)))
        first = next(i for i, call in enumerate(calls.made) if call.name == "unlink")
        seen = []
        with Calls(at(first, failing(errno.EACCES))).watched(), caplog.at_level(logging.WARNING):
            trained(program, ff.every(2, saved(tmp_path / "b", keep=1), lambda tick: seen.append(dict(tick.results))))
        assert "could not be removed" in caplog.text
        assert seen == [{}] * 4
        assert names(tmp_path / "b") == ["checkpoint-8"]


TROUBLE = {
    "a full disk": errno.ENOSPC,
    "a read-only one": errno.EROFS,
    "no permission": errno.EACCES,
    "a broken one": errno.EIO,
    "a quota": errno.EDQUOT,
}


def full(call, perform):
    """Find no space for a new file."""
    return failing(errno.ENOSPC)(call, perform) if call.name == "create" else perform()


class TestTrouble:
    """A save that fails: training goes on, the failure is reported, the next look tries again."""

    @pytest.mark.parametrize("name", TROUBLE)
    def test_that_passes(self, program, tmp_path, name):
        seen, trouble = [], threading.Event()

        def fault(call, perform):
            return failing(TROUBLE[name])(call, perform) if trouble.is_set() else perform()

        def turn(tick):
            seen.append((tick.state.step, latest(tmp_path).step, tick.results.get("save_failures")))
            (trouble.set if tick.state.step in (2, 3) else trouble.clear)()

        with Calls(lambda number: fault).watched():
            state = trained(program, ff.every(1, saved(tmp_path, async_=False), turn))
        expected = [(1, 1, None), (2, 2, None), (3, 2, 1.0), (4, 2, 2.0), *((k, k, None) for k in (5, 6, 7, 8))]
        assert seen == expected
        assert_equal(state, trajectory()[STEPS])
        assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 5, 6, 7, 8)]

    def test_is_reported_at_the_next_look_of_an_asynchronous_run(self, program, tmp_path):
        seen = []
        with Calls(at(8, failing(errno.EIO))).watched():
            trained(program, ff.every(2, saved(tmp_path), lambda tick: seen.append(tick.results.get("save_failures"))))
        assert seen == [None, 1.0, None, None]
        assert steps(tmp_path) == [4, 6, 8]

    def test_is_in_the_report(self, program, tmp_path):
        rows = []
        with Calls(at(8, failing(errno.EIO))).watched():
            trained(program, ff.every(2, saved(tmp_path, async_=False), ff.report(rows.append)))
        assert [row.values.get("save_failures") for row in rows] == [1.0, None, None, None]

    def test_too_often_in_a_row_ends_the_run(self, program, tmp_path):
        program.init(0)
        save(program, program.init(0), tmp_path)
        seen = []
        with (
            Calls(from_then_on(1, failing(errno.ENOSPC))).watched(),
            pytest.raises(SaveError) as caught,
        ):
            trained(program, ff.every(1, saved(tmp_path, failures=3), lambda tick: seen.append(tick.state.step)))
        text = str(caught.value)
        assert text.startswith(f"3 saves to {tmp_path} in a row have failed, the last with OSError: [Errno 28]")
        assert "The newest whole checkpoint is " in text
        assert "checkpoint-0." in text
        assert isinstance(caught.value.__cause__, OSError)
        assert seen == [1, 2, 3]

    def test_now_and_then_does_not(self, program, tmp_path):
        count = iter(range(1000))

        def fault(call, perform):
            second = call.name == "make_directory" and ".tmp" in call.path.name and next(count) % 2
            return failing(errno.EIO)(call, perform) if second else perform()

        with Calls(lambda number: fault).watched():
            trained(program, ff.every(1, saved(tmp_path, failures=2)), batches=BATCHES[:7])
        assert steps(tmp_path) == [1, 3, 5, 7]

    def test_at_the_end_is_tried_once_more(self, program, tmp_path):
        with Calls().watched() as calls:
            trained(program, ff.at(8, saved(tmp_path / "a")))
        with Calls(at(len(calls.made) - 4, failing(errno.EIO))).watched():
            state = trained(program, ff.at(8, saved(tmp_path / "b")))
        assert_equal(program.restore(tmp_path / "b"), state)
        assert names(tmp_path / "b") == ["checkpoint-8"]

    def test_at_the_end_is_an_error(self, program, tmp_path):
        with (
            Calls(lambda number: full).watched(),
            pytest.raises(SaveError, match=r"No space left .*The newest whole checkpoint is none\."),
        ):
            trained(program, ff.at(8, saved(tmp_path)))

    def test_at_the_only_look_at_the_end_is_an_error(self, program, tmp_path):
        with (
            Calls(lambda number: full).watched(),
            pytest.raises(SaveError, match="No space left"),
        ):
            trained(program, ff.at_end(saved(tmp_path)))

    def test_with_too_little_space_is_seen_beforehand(self, program, tmp_path, monkeypatch):
        space = iter([10**9, 100, 10**9])
        monkeypatch.setattr(system, "free_bytes", lambda path: next(space))
        rows = []
        trained(program, ff.every(2, saved(tmp_path, async_=False), ff.report(rows.append)), batches=BATCHES[:6])
        assert [row.values.get("save_failures") for row in rows] == [None, 1.0, None]
        assert steps(tmp_path) == [2, 6]

    def test_with_a_directory_that_vanished_and_came_back(self, program, tmp_path):
        run, elsewhere, seen = tmp_path / "run", tmp_path / "elsewhere", []

        def move(tick):
            seen.append(tick.results.get("save_failures"))
            if tick.state.step == 2:
                shutil.move(run, elsewhere)
            if tick.state.step == 6:
                shutil.move(elsewhere, run)

        state = trained(program, ff.every(2, saved(run, async_=False), move))
        assert seen == [None, 1.0, 2.0, None]
        assert steps(run) == [2, 8]
        assert_equal(state, trajectory()[STEPS])

    def test_with_a_directory_that_vanished_for_good(self, program, tmp_path):
        run = tmp_path / "run"
        with pytest.raises(SaveError, match=r"No such file or directory.*The newest whole checkpoint is none"):
            trained(program, ff.every(4, saved(run, async_=False), lambda tick: shutil.rmtree(run, ignore_errors=True)))

    def test_leaves_what_was_saved_as_it_was(self, program, tmp_path):
        trained(program, ff.at(2, saved(tmp_path)), batches=BATCHES[:2])
        before = content(tmp_path / "checkpoints")
        on = ff.every(4, saved(tmp_path, keep=1))(program.steps(program.restore(tmp_path), BATCHES[2:]))
        with Calls(from_then_on(3, failing(errno.ENOSPC))).watched(), pytest.raises(SaveError):
            ff.last(on)
        assert latest(tmp_path).step == 2
        kept = content(tmp_path / "checkpoints")
        assert {name: kept[name] for name in before} == before

    def test_with_something_that_cannot_be_saved_says_what(self, tmp_path):
        transform = ff.Transform(lambda params: {1: torch.zeros(2)}, lambda gradients, state, **_: (gradients, state))
        program = small(transforms=(transform,))
        with pytest.raises(ValueError, match="transforms/0: a checkpoint holds mappings whose keys"):
            trained(program, ff.every(4, saved(tmp_path)))

    def test_with_the_state_itself_is_not_a_failed_save(self, program, tmp_path):
        """A state that is not finite is never saved as if it were good, and the run ends at once."""

        def spoil(tick):
            tick.state.nonfinite.fill_(1)

        with pytest.raises(ff.NonFiniteError, match="step 1"):
            trained(program, ff.at(2, spoil, saved(tmp_path)))
        assert steps(tmp_path) == []

    def test_that_ends_the_run_while_it_is_opened(self, program, tmp_path):
        (tmp_path / "checkpoints").write_text("a file")
        state = program.init(0)
        with pytest.raises(OSError):
            toolz.pipe(program.steps(state, BATCHES), ff.every(1, saved(tmp_path)), ff.last)
        assert not state.consumed


HELD = """
import sys
import threading
import time
import forgather_fn as ff
from forgather_fn.checkpoint import saved, saving
from tests.checkpoint.subjects import BATCHES, small

commit = saving.commit

def late(*args):
    while threading.main_thread().is_alive():  # the save of step 2 is still running when the interpreter ends
        time.sleep(0.01)
    return commit(*args)

saving.commit = late

def train():
    program = small()
    ticks = iter(ff.every(2, saved(sys.argv[1]))(program.steps(program.init(0), BATCHES)))
    for tick in ticks:
        if tick.state.step == 3:
            raise KeyError("planted")

train()
"""


def test_an_exception_that_holds_the_stream_does_not_hold_up_the_interpreter(tmp_path):
    """Its traceback keeps the iterator until the very end, where it is closed and no thread can be started."""
    command = [sys.executable, "-c", HELD, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == b"KeyError: 'planted'"
    assert steps(tmp_path) == [2]


def test_resuming_finds_what_was_saved_by_the_observer(program, tmp_path):
    batches = labelled_batches(STEPS, size=4)
    trained(program, ff.every(3, saved(tmp_path)), batches=batches[:5])
    assert_equal(finished(program, program.restore(tmp_path)), trajectory()[STEPS])
