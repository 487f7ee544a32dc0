"""Every system call of a save, in turn: the process is killed there, the call fails, the power is lost.

Whatever happens, the newest whole checkpoint is the one before or the new one, to the bit; it can be gone on from; and
the next save succeeds and cleans up.
"""

import contextlib
import errno
import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import attrs
import pytest

import forgather_fn as ff
from forgather_fn.checkpoint import SaveError, latest, list_checkpoints, save, saved, verify
from tests.checkpoint.faults import (
    NAMES,
    Call,
    Calls,
    Disk,
    at,
    content,
    failing,
    forked,
    from_then_on,
    killed,
    laid_out,
    late,
    names,
    short,
    torn,
)
from tests.checkpoint.subjects import BATCHES, STEPS, finished, small, trajectory
from tests.toys import assert_equal

# A scenario goes on, in the run of another training, from a state of which the run has no checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:.* of an earlier training")


@functools.cache
def program():
    made = small()
    made.init(0)
    return made


@functools.cache
def detour():
    """A run that went back to step 2 and trained on, on other batches: its states by step."""
    states, made = {2: trajectory()[2]}, program()
    for step in (2, 3):
        states[step + 1] = made.step(states[step].copy(), BATCHES[-step])[0]
    return states


@attrs.frozen
class Scenario:
    """A save, and what may be found after it was stopped.

    Attributes:
        before: The steps of which there are checkpoints.
        act: Saves in a run directory.
        old: The state of the newest checkpoint before.
        new: The state that is saved.
        keeps: Whether the older checkpoints stay.
    """

    before: tuple[int, ...]
    act: Callable[[Path], object]
    old: ff.TrainState | None
    new: ff.TrainState
    keeps: bool = True

    def next(self, run: Path) -> None:
        """Save the last state of the run, in the same way."""
        if self.keeps:
            save(program(), trajectory()[STEPS], run)
        else:
            look(run, trajectory()[STEPS - 1], BATCHES[STEPS - 1])


def look(run, state, batch):
    """Make one step under an observer that keeps one checkpoint, and let it save."""
    steps = program().steps(state.copy(), [batch])
    return ff.last(ff.every(1, saved(run, keep=1, async_=False))(steps))


@functools.cache
def scenarios():
    states, other = trajectory(), detour()
    return {
        "the first": Scenario((), lambda run: save(program(), states[2], run), None, states[2]),
        "another": Scenario((2,), lambda run: save(program(), states[4], run), states[2], states[4]),
        "one of a step that there is": Scenario(
            (2, 4), lambda run: save(program(), other[4], run), states[4], other[4]
        ),
        "one that rotates": Scenario(
            (2,), lambda run: look(run, states[3], BATCHES[3]), states[2], states[4], keeps=False
        ),
        "one that rotates, of a step that there is": Scenario(
            (2, 4), lambda run: look(run, other[3], BATCHES[-3]), states[4], other[4], keeps=False
        ),
    }


SCENARIOS = (
    "the first",
    "another",
    "one of a step that there is",
    "one that rotates",
    "one that rotates, of a step that there is",
)


@pytest.fixture(params=SCENARIOS)
def scenario(request):
    return scenarios()[request.param]


@pytest.fixture
def places(scenario, tmp_path) -> Iterator[Path]:
    """Give run directories, as many as are asked for, with what the scenario begins with."""
    template = tmp_path / "template"
    template.mkdir()
    for step in scenario.before:
        save(program(), trajectory()[step], template)

    def made():
        for number in range(10_000):
            place = tmp_path / str(number)
            yield Path(shutil.copytree(template, place))
            shutil.rmtree(place)

    with contextlib.closing(made()) as directories:
        yield directories


def calls_of(scenario: Scenario, run: Path) -> list[Call]:
    with Calls().watched() as calls:
        scenario.act(run)
    return calls.made


def found(scenario: Scenario, run: Path) -> ff.TrainState | None:
    """Check what a new process finds: the old state, or the new one. Give which."""
    if latest(run) is None:
        assert scenario.old is None
        assert list_checkpoints(run) == []
        return None
    state = program().restore(run)
    if ff.difference(state, scenario.new) is None:
        return scenario.new
    assert scenario.old is not None
    assert_equal(state, scenario.old)
    return scenario.old


@functools.cache
def ending(state: ff.TrainState) -> ff.TrainState:
    return finished(program(), state.copy())


def check(scenario: Scenario, run: Path) -> bool:
    """Check what is found, that it can be gone on from, and the next save. Tell whether it was the new one."""
    state = found(scenario, run)
    if state is not None:
        assert_equal(finished(program(), program().restore(run)), ending(state))
    scenario.next(run)
    assert_equal(program().restore(run), trajectory()[STEPS])
    steps = {STEPS, *scenario.before, *([scenario.new.step] if state is scenario.new else [])}
    assert names(run) == [f"checkpoint-{step}" for step in sorted(steps if scenario.keeps else {STEPS})]
    assert [fault for entry in list_checkpoints(run) for fault in verify(entry.path)] == []
    return state is scenario.new


class TestAKill:
    def test_at_every_call(self, scenario, places):
        outcomes = set()
        for index in range(len(calls_of(scenario, next(places)))):
            run = next(places)
            with Calls(at(index, killed)).watched():
                assert forked(lambda run=run: scenario.act(run)).code == -signal.SIGKILL
            outcomes.add(check(scenario, run))
        assert outcomes == {False, True}  # some came before the commit, and some after

    def test_in_the_middle_of_every_write(self, scenario, places):
        for index, call in enumerate(calls_of(scenario, next(places))):
            if call.name == "write":
                run = next(places)
                with Calls(at(index, torn(killed))).watched():
                    assert forked(lambda run=run: scenario.act(run)).code == -signal.SIGKILL
                assert not check(scenario, run)


class TestAFailure:
    def test_of_any_call(self, scenario, places):
        check_failures(scenario, places, failing(errno.EIO), NAMES)

    def test_for_lack_of_space(self, scenario, places):
        check_failures(scenario, places, torn(failing(errno.ENOSPC)), ("make_directory", "create", "write", "rename"))

    def test_of_a_call_that_was_made_nevertheless(self, scenario, places):
        check_failures(scenario, places, late(errno.EIO), ("sync", "sync_directory", "rename", "unlink"))

    def test_of_any_call_and_all_after_it(self, scenario, places):
        for index in range(len(calls_of(scenario, next(places)))):
            run = next(places)
            with Calls(from_then_on(index, failing(errno.EIO))).watched(), suppressed():
                scenario.act(run)
            check(scenario, run)

    def test_a_write_that_is_cut_short_is_gone_on_with(self, scenario, places):
        run = next(places)
        with Calls(from_then_on(0, short)).watched():
            scenario.act(run)
        assert check(scenario, run)


def check_failures(scenario, places, fault, kinds):
    """Let one call after the other fail: nothing of it is left lying about, and what was there is as it was."""
    for index, call in enumerate(calls_of(scenario, next(places))):
        if call.name not in kinds:
            continue
        run = next(places)
        before = content(run / "checkpoints")
        with Calls(at(index, fault)).watched() as calls, suppressed():
            scenario.act(run)
        after = content(run / "checkpoints")
        if found(scenario, run) is scenario.old:
            assert after == before, calls.made[index]
        check(scenario, run)


def suppressed():
    return contextlib.suppress(OSError, SaveError)


class TestALossOfPower:
    def test_at_every_call(self, scenario, places, tmp_path):
        check_losses_of_power(scenario, places, tmp_path)

    def test_after_a_save_has_returned(self, scenario, places, tmp_path):
        check_durable(scenario, next(places), tmp_path)

    def test_of_directories_that_the_save_made(self, tmp_path):
        disk = Disk(tmp_path)
        with Calls(seen=disk.seen).watched():
            save(program(), trajectory()[2], tmp_path / "runs" / "a")
        place = laid_out(disk.kept(), tmp_path / "after")
        assert_equal(program().restore(place / "runs" / "a"), trajectory()[2])


def as_usual(call, perform):
    return perform()


def check_losses_of_power(scenario, places, tmp_path, plant=as_usual):
    """Check what may be left on the disk before each call, and after the last."""
    run = next(places)
    disk, left = Disk(run), {}

    def looking(call, perform):
        left.update(dict.fromkeys(disk.possible()))
        return plant(call, perform)

    with Calls(lambda number: looking, seen=disk.seen).watched():
        scenario.act(run)
    left.update(dict.fromkeys(disk.possible()))
    for number, layout in enumerate(left):
        check(scenario, laid_out(layout, tmp_path / f"after {number}"))


def check_durable(scenario, run, tmp_path, plant=as_usual):
    """Check that a checkpoint whose save has returned is on the disk, every file of it."""
    disk = Disk(run)
    with Calls(lambda number: plant, seen=disk.seen).watched():
        scenario.act(run)
    for number, layout in enumerate(disk.possible()):
        assert found(scenario, laid_out(layout, tmp_path / f"after {number}")) is scenario.new


class TestPlantedBugs:
    """The checks above fail where a save lacks a sync, or makes its calls in another order."""

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("sync", "model.safetensors"),
            ("sync", "optimizer.safetensors"),
            ("sync", "buffers.safetensors"),
            ("sync", "ema.safetensors"),
            ("sync", "state.json"),
            ("sync", "manifest.json"),
            ("sync_directory", ".tmp-checkpoint-*"),
            ("sync_directory", "checkpoints"),
            ("sync_directory", "run"),
        ],
    )
    def test_a_sync_that_is_left_out(self, tmp_path, kind, name):
        def plant(call, perform):
            return None if call.name == kind and fnmatch(call.path.name, name) else perform()

        run = tmp_path / "run"
        run.mkdir()
        with pytest.raises(AssertionError):
            check_durable(scenarios()["the first"], run, tmp_path, plant)

    @pytest.mark.parametrize("late", ["manifest.json", "model.safetensors", ".tmp-checkpoint-*"])
    @pytest.mark.parametrize("scenario", ["another"], indirect=True)
    def test_a_sync_that_comes_after_the_rename(self, scenario, places, tmp_path, late):
        put_off = []

        def plant(call, perform):
            if call.name.startswith("sync") and fnmatch(call.path.name, late):
                put_off.append(perform)
                return None
            result = perform()
            while call.name == "rename" and put_off:
                with contextlib.suppress(OSError, KeyError):  # the temporary directory is gone
                    put_off.pop()()
            return result

        with pytest.raises(AssertionError):
            check_losses_of_power(scenario, places, tmp_path, plant)

    @pytest.mark.parametrize("scenario", ["one that rotates"], indirect=True)
    def test_a_removal_that_does_not_wait_for_its_rename(self, scenario, places, tmp_path):
        moved = []

        def plant(call, perform):
            moved.extend(call.args[1:] if call.name == "rename" else [])
            trashed = bool(moved) and ".trash" in str(moved[-1])
            return None if call.name == "sync_directory" and trashed else perform()

        with pytest.raises(AssertionError):
            check_losses_of_power(scenario, places, tmp_path, plant)

    @pytest.mark.parametrize("scenario", ["one of a step that there is"], indirect=True)
    def test_one_that_removes_the_old_one_first(self, scenario, places):
        def plant(call, perform):
            if call.name == "rename" and call.path.name == "checkpoint-4":
                shutil.rmtree(call.path)
                return None
            return killed(call, perform) if call.name == "rename" else perform()

        run = next(places)
        with Calls(lambda number: plant).watched():
            assert forked(lambda: scenario.act(run)).code == -signal.SIGKILL
        with pytest.raises(AssertionError):
            check(scenario, run)
