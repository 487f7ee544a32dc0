"""Saving: now, or beside the training."""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.alike import bits
from forgather_fn.checkpoint import catalog
from forgather_fn.checkpoint.commit import Session, commit, open_session, rotate
from forgather_fn.checkpoint.lock import locked
from forgather_fn.checkpoint.rotation import Best, Policy, best_of, replaced
from forgather_fn.checkpoint.shards import commit_portions
from forgather_fn.checkpoint.snapshot import Memory, Snapshot, snapshot
from forgather_fn.checkpoint.system import path_of
from forgather_fn.course import tell_unheard
from forgather_fn.loop import Run, Steps, Tick
from forgather_fn.portion import Portion
from forgather_fn.program import Program
from forgather_fn.signature import checked
from forgather_fn.stages import Observer, once
from forgather_fn.state import TrainState, raise_if_nonfinite
from forgather_fn.world import ALONE, World, check_same, known_to_all

FAILURES: Final = 3
"""How many saves in a row may fail before the run does."""


_UNLIKE: Final = (
    "the processes of a run save together, into one run directory: leave the rank out of its name. They were given:"
)


class SaveError(RuntimeError):
    """Checkpoints could not be written; training went on, the older ones are as they were."""


def save(program: Program, state: TrainState, run: str | Path, *, pinned: bool = False) -> Path:
    """Save a state as a checkpoint of a run, and wait until it is on the disk.

    Of several processes, which all call it, the first one writes; none goes on before that has succeeded or failed.

    Args:
        program: Whose state it is.
        state: Not consumed.
        run: The run directory; checkpoints lie in its ``checkpoints/``.
        pinned: Whether rotation must leave it.

    Returns:
        ``run/checkpoints/checkpoint-<step>``.

    Raises:
        NonFiniteError: A step before was not finite; such a state is never saved as if it were good.
        RunLockedError: Another process writes to the run.
        OSError: It could not be written; what was there before is as it was.
        PeerError: One of these happened on the first process.
    """
    if not (isinstance(program, Program) and isinstance(state, TrainState)):
        raise ValueError(
            "save takes a program, its state, and a run directory, in this order; got a "
            f"{type(program).__name__} and a {type(state).__name__}"
        )
    place = path_of(run, "save")
    program.world.begin("a save")
    check_same(program.world.gather(os.path.abspath(run)), _UNLIKE)
    raise_if_nonfinite(program.check(state))
    portion = program.portion()
    if portion is not None:
        return _save_portions(place, state, program, portion, pinned)
    whole = _whole(program, state)

    def commit_here() -> Path:
        assert whole is not None
        taken, copy = snapshot(whole, program, None, {}, Memory() if whole is state else None)
        copy()
        with locked(place):
            return commit(open_session(place), taken, pinned=pinned)

    return program.world.first(commit_here)


def _save_portions(run: Path, state: TrainState, program: Program, portion: Portion, pinned: bool) -> Path:
    with contextlib.ExitStack() as stack:
        sessions: list[Session] = []

        def begin() -> None:
            stack.enter_context(locked(run))
            sessions.append(open_session(run))

        program.world.first(begin)
        return commit_portions(sessions[0] if sessions else None, state, program, portion, pinned=pinned)


@checked
def saved(
    run: str | Path,
    *,
    keep: int | None = None,
    best: str | None = None,
    greater_is_better: bool = False,
    resumed_from: str | Path | None = None,
    async_: bool = True,
    failures: int = FAILURES,
) -> Observer:
    """Save the state as a checkpoint, as an observer, and at the end of the stream once more.

    The run's lock is held while the stream runs. A save that fails leaves the older checkpoints as they are and
    training goes on; the failure is reported as ``save_failures``, the next look tries again, and the run fails after
    several in a row, or at its end. Of several processes the first one writes, and all of them know of its failures.

    When the stream begins before the newest checkpoint of the run, and at a step of which there is none, a warning says
    that it replaces those of another training; it is silent where ``resumed_from`` says what it goes on from.

    Args:
        run: The run directory; checkpoints lie in its ``checkpoints/``.
        keep: How many of the newest are kept; None for all.
        best: A result of an observer upstream, such as ``"eval_loss"``: the checkpoint with the best is kept too. A
            warning at the end of the stream says that there was none of this name.
        greater_is_better: Of the numbers compared; False where less is better. Only with ``best``.
        resumed_from: The checkpoint that this run goes on from, which is never removed; of a run directory, its latest.
        async_: Copy and write while training goes on: only the next update waits for the copy. False waits.
        failures: How many saves in a row may fail before the run does.

    Raises:
        RunLockedError: When the stream begins: another process writes to the run.
        SaveError: At a later tick or at the end: saves have failed.
        ValueError: ``keep`` or ``failures`` is less than 1; it is told what is better, and not of which result; or
            ``resumed_from`` is not there.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"saved: keep must be an integer of at least 1, or None to keep all; got {keep!r}")
    if failures < 1:
        raise ValueError(f"saved: failures must be an integer of at least 1; got {failures!r}")
    if best == "" or (best is None and greater_is_better):
        raise ValueError(
            f"saved: best={best!r}, greater_is_better={greater_is_better}: expected the name of the result that is "
            "compared, such as best='eval_accuracy'"
        )
    policy = Policy(
        keep=keep,
        best=None if best is None else Best(best, greater_is_better=greater_is_better),
        resumed_from=None if resumed_from is None else _resumed(resumed_from),
    )
    writer = _Writer(path_of(run, "saved").resolve(), os.path.abspath(run), policy, async_, failures)
    answers = {"save": writer.answer}
    return once(Observer(writer.observe, open=writer.open, end=writer.end, close=writer.close, answers=answers))


def _resumed(path: str | Path) -> Path:
    place = path_of(path, "saved: resumed_from").resolve()
    entry = catalog.entry(place)
    found = entry if entry.manifest else catalog.latest(place)
    if found is None:
        raise ValueError(f"saved: resumed_from={str(path)!r}: there is no checkpoint")
    return found.path


@attrs.define(eq=False)
class _Writer:
    """At most one save at a time, and what became of the last ones."""

    run: Path
    named: str  # without following links, which may lead elsewhere on another machine
    policy: Policy
    background: bool
    allowed: int
    memory: Memory = attrs.field(factory=Memory)
    stack: contextlib.ExitStack = attrs.field(factory=contextlib.ExitStack)
    session: Session | None = None
    world: World = ALONE
    thread: threading.Thread | None = None
    errors: list[BaseException] = attrs.field(factory=list)
    last: int | None = None
    stream: Run | None = None
    known: set[str] = attrs.field(factory=set)

    def open(self, steps: Steps) -> None:
        self.world = steps.world
        self.world.begin("a stream that is saved")
        check_same(self.world.gather(self.named), _UNLIKE)
        self.world.first(lambda: self._begin(steps.state.step))
        self.errors, self.last, self.stream, self.known = [], None, None, set()

    def _begin(self, step: int) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.run))
            self.session = open_session(self.run)
            if self.policy.resumed_from is None:
                self._tell_of_other(step)
            self.stack = stack.pop_all()

    def _tell_of_other(self, step: int) -> None:
        """Warn of checkpoints that the state which the stream begins with was not made from."""
        other = replaced(catalog.list_checkpoints(self.run), step)
        if other is not None:
            warnings.warn(
                f"saved({str(self.run)!r}): the run holds checkpoints up to step {other.step} of an earlier training, "
                f"and the stream begins at step {step}, of which there is none: go on with program.restore(run), or "
                "use another directory. The older checkpoints are replaced as their steps pass, and until the first "
                "save the newest of the run is one of them",
                stacklevel=2,
            )

    def observe(self, tick: Tick) -> Mapping[str, float]:
        self.world.begin("a save")
        self.settle()
        failures = self._failures()
        if len(failures) >= self.allowed:
            raise self._failed(failures)
        self._save(tick)
        if not self.background:
            self.settle()
            failures = self._failures()
        told = "save_failures" in tick.results  # by another one, or by this one in a stage upstream
        return {"save_failures": float(len(failures))} if failures and not told else {}

    def _failures(self) -> list[str]:
        """Give what has gone wrong since the last save that succeeded, which all processes know alike."""
        told: list[str] = self.world.broadcast([f"{type(error).__name__}: {error}" for error in self.errors])
        return told

    def answer(self, tick: Tick) -> "Future[Mapping[str, Any]]":
        """Save off the schedule; what the last look has saved is not written again."""
        self.world.begin("a save")
        self.settle()
        done: Future[Mapping[str, Any]] = Future()
        if self.last != tick.state.step or self._failures():
            self._save(tick, done)
        elif self.session is not None:
            done.set_result({"path": str(self.session.directory / f"checkpoint-{self.last}")})
        if not self.world.main and not done.done():
            done.set_result({})  # the first process saves for all
        return done

    def _save(self, tick: Tick, done: "Future[Mapping[str, Any]] | None" = None) -> None:
        done = Future() if done is None else done
        self._check_stream(tick)
        state = tick.state
        self.last = state.step
        self.known.update(tick.results)
        raise_if_nonfinite(state)
        portion = tick.run.program.portion()
        if portion is not None:
            self._save_portion(tick, portion, done)
            return
        whole = _whole(tick.run.program, state)
        if not self.world.main:
            return
        assert whole is not None
        memory = self.memory if whole is state else None
        taken, copy = snapshot(whole, tick.run.program, tick.run.data, tick.results, memory)
        copied, claim = threading.Event(), threading.Lock()

        def work() -> None:
            if not claim.acquire(blocking=False):
                return  # the start of this thread was interrupted
            try:
                try:
                    copy()
                finally:
                    copied.set()
                done.set_result({"path": str(self._commit(taken))})
            except BaseException as error:  # whatever it is, it surfaces at the next look
                self.errors.append(error)
                done.set_exception(error)

        thread = threading.Thread(target=work, name="checkpoint writer")
        try:
            self.thread = thread
            state.lend(copied.wait)
            self._start(thread, done)
        finally:
            if thread.ident is None and claim.acquire(blocking=False):
                self.thread = None  # it does not run, and never will: nobody may wait for it
                copied.set()

    def _check_stream(self, tick: Tick) -> None:
        if tick.run is not (self.stream or tick.run):
            raise ValueError(
                f"saved({str(self.run)!r}) looks at two streams at a time, whose checkpoints would be of one run: give "
                "each an observer, and a run directory, of its own"
            )
        self.stream = tick.run

    def _start(self, thread: threading.Thread, done: "Future[Mapping[str, Any]]") -> None:
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread to give: a save that failed, as any other may
            self.errors.append(error)
            done.set_exception(error)

    def _save_portion(self, tick: Tick, portion: Portion, done: "Future[Mapping[str, Any]]") -> None:
        """Save at once what all processes have together; a failure that all know of is one of this save."""
        program, data = tick.run.program, tick.run.data
        try:
            path = commit_portions(self.session, tick.state, program, portion, data=data, metrics=tick.results)
        except Exception as error:
            if not getattr(error, "known_to_all", False):
                raise
            self.errors.append(error)
            done.set_exception(error)
            return
        self.errors.clear()
        done.set_result({"path": str(path)})
        if self.session is not None:
            rotate(self.session.directory, self.policy)

    def _commit(self, taken: Snapshot) -> Path:
        assert self.session is not None
        path = commit(self.session, taken)
        self.errors.clear()
        rotate(self.session.directory, self.policy)
        return path

    def settle(self) -> None:
        """Wait for the save that is going on."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def end(self, tick: Tick) -> None:
        """Save the last state, if the last look did not or could not, and wait."""
        self.settle()
        if sys.is_finalizing():
            return  # an exception held the stream until the interpreter's end, where no thread can be started
        self.world.begin("a save")
        failures = self._failures()
        if self.last != tick.state.step or failures:
            self._save(tick)
            self.settle()
            failures = self._failures()
        if failures:
            raise self._failed(failures)

    def close(self) -> None:
        try:
            self.settle()
        finally:
            self.stack.close()
        self._tell_of_best()

    def _tell_of_best(self) -> None:
        """Warn of a result by which no checkpoint of the stream could be the best."""
        wanted = self.policy.best
        if wanted is None or wanted.metric in self.known or self.stream is None:
            return
        best = wanted.metric
        course = self.stream.course
        if best in course.found:
            warnings.warn(
                f"saved(best={best!r}): no checkpoint has this result, which was found at other steps than those that "
                "were saved, or after them; evaluate in the same stage, before: ff.every(100, ff.evaluated(...), "
                "ff.saved(...))",
                stacklevel=2,
            )
        tell_unheard("saved", best, course)
        if self.session is not None and best_of(catalog.list_checkpoints(self.run), wanted) is None:
            course.waiting["saved"] = best

    def _failed(self, failures: Sequence[str]) -> SaveError:
        newest = catalog.latest(self.run)
        error = SaveError(
            f"{len(failures)} saves to {self.run} in a row have failed, the last with {failures[-1]}. "
            f"The newest whole checkpoint is {newest.path if newest else 'none'}."
        )
        error.__cause__ = self.errors[-1] if self.errors else None
        return known_to_all(error)


def _whole(program: Program, state: TrainState) -> TrainState | None:
    """Give what the first process writes for all: the state that every one has, or what they have brought together."""
    whole = program.whole(state)
    if whole is state:
        check_parameters(program.world, state)
    return whole


def check_parameters(world: World, state: TrainState) -> None:
    """Make sure that all processes have the same parameters, to the bit, before one of them saves for all.

    Raises:
        RuntimeError: They have drifted apart.
    """
    if world.size == 1:
        return
    sums = world.gather(bits(state.read().params))
    odd = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if odd:
        error = RuntimeError(
            f"the processes have drifted apart: the parameters of ranks {odd} are not those of rank 0 after step "
            f"{state.step}. Was a state, a gradient or a parameter changed on one process alone?"
        )
        raise known_to_all(error)
