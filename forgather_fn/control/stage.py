"""The control stage: between two steps, what was asked for from outside is done."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Final

import attrs

from forgather_fn import interrupt
from forgather_fn.checkpoint import latest, save
from forgather_fn.control.agreement import Agree, agreeing
from forgather_fn.control.command import Command
from forgather_fn.control.inbox import Inbox, Request
from forgather_fn.control.progress import Numbers, Progress
from forgather_fn.dispatch import closing
from forgather_fn.loop import Answer, Demand, Stage, Steps, Tick
from forgather_fn.state import NonFiniteError
from forgather_fn.world import World, known_to_all

logger = logging.getLogger(__name__)

EXIT_CODE: Final = 3
"""Of a process that was aborted."""


class Aborted(SystemExit):
    """The run was aborted from outside: nothing was saved, older checkpoints are as they were.

    Left alone it ends the process with exit code 3.
    """

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


def controlled(inbox: Inbox) -> Stage:
    """Do, between two steps, what was asked for from outside: save, evaluate, stop, abort.

    Saves and evaluations are those of the observers upstream: :func:`~forgather_fn.checkpoint.saving.saved` and
    :func:`~forgather_fn.observers.evaluated`, off their schedule. So it is written after them. Where nothing upstream
    saves, a checkpoint is written to the inbox's run. A stop ends the stream as ``until`` does; an abort raises
    :class:`Aborted`, on one process also between microbatches. What cannot be done is answered so, and the run goes on.

    Args:
        inbox: What :func:`~forgather_fn.control.serving.serve` gave. Where nobody asks for anything, a step costs one
            or two microseconds more. Of several processes each has one, and the first one's counts.

    Raises:
        Aborted: By the stream: it was asked for.
        ValueError: It is no inbox.
    """
    if not isinstance(inbox, Inbox):
        raise ValueError(f"controlled takes an inbox, as `with ff.serve(run) as inbox` gives it; got {inbox!r}")

    def stage(steps: Steps) -> Steps:
        def opened(demand: Demand) -> Iterator[Tick]:
            inbox.attended = True  # before the first step, which may take long
            control = _Control(inbox, steps.answers, steps.world, agreeing(steps.world))
            alone = interrupt.watching(control.leave) if steps.world.size == 1 else contextlib.nullcontext()
            ticks = steps.open(demand)
            try:
                with alone, closing(ticks):
                    for tick in ticks:
                        yield control.act(tick)
                        if control.stopping:
                            break
            except GeneratorExit:
                control.ended()
                raise
            except BaseException as error:
                control.broke(error)
                raise
            control.ended()

        # It saves where it stands: a change of the state after it would come too late, as after ff.saved.
        return attrs.evolve(steps, open=opened, answers={"save": (), **steps.answers})

    return stage


@attrs.define(eq=False)
class _Control:
    """What one stream was asked for: at most one command a step."""

    inbox: Inbox
    answers: Mapping[str, tuple[Answer, ...]]
    world: World
    agree: Agree
    sent: list[Request] = attrs.field(factory=list)
    ends: list[Request] = attrs.field(factory=list)
    progress: Progress | None = None

    @property
    def stopping(self) -> bool:
        return bool(self.ends)

    @property
    def step(self) -> int:
        return self.progress.step if self.progress else 0

    def act(self, tick: Tick) -> Tick:
        """Tell where the run is, and do what is due."""
        self._note(tick)
        mine = self.inbox.take() if self.world.main else None
        if mine is not None:
            self.sent.append(mine)
        command = self.agree(mine.command if mine else None)
        if command is None:
            return tick
        request = self.sent.pop(0) if self.world.main else Request(command)
        logger.info("step %d: %s was asked for", tick.state.step, command)
        return _ACTIONS[command](self, request, tick)

    def _note(self, tick: Tick) -> None:
        state, run, inbox = tick.state, tick.run, self.inbox
        now = inbox.clock()
        if self.progress is None:
            self.progress = Progress(run.started, run.horizon, run.epoch, (state.step, state.samples, now))
            inbox.progress, inbox.world_size = self.progress, self.world.size
        self.progress.advance(state.step, state.samples, now)
        if "save_failures" in tick.results:
            inbox.last_error = f"step {state.step}: {tick.results['save_failures']:g} saves in a row have failed"
        if inbox.looked_for():
            values = {name: number for name, value in tick.metrics.items() if (number := _number(value)) is not None}
            inbox.show(Numbers(state.step, now, {**values, **tick.results}))

    def save(self, request: Request, tick: Tick) -> Tick:
        self._told(request, tick.state.step, self._saves(tick))
        return tick

    def save_stop(self, request: Request, tick: Tick) -> Tick:
        """End when it is saved, on every process; a run that cannot save goes on."""
        saves = self._saves(tick)
        failures = [one for one in self.world.gather(_failure(saves)) if one is not None]
        if failures:
            self._failed(request, f"{failures[0]}; the run goes on")
        else:
            self.ends.append(request)
        return tick

    def _saves(self, tick: Tick) -> "list[Future[Mapping[str, Any]]]":
        answers = self.answers.get("save") or (self._save_to_run,)
        return [_begun(answer, tick) for answer in answers]

    def _save_to_run(self, tick: Tick) -> "Future[Mapping[str, Any]]":
        done: Future[Mapping[str, Any]] = Future()
        if self.inbox.run is None:
            raise ValueError("this run saves nothing: write ff.every(n, ff.saved(run)) before ff.controlled(inbox)")
        done.set_result({"path": str(save(tick.run.program, tick.state, self.inbox.run))})
        return done

    def _told(self, request: Request, step: int, saves: "list[Future[Mapping[str, Any]]]") -> None:
        """Answer when the last of the saves is on the disk, from the thread that wrote it."""

        def settled(one: "Future[Mapping[str, Any]]") -> None:
            del one
            if not all(save.done() for save in saves):
                return
            failure = _failure(saves)
            if failure is not None:
                self._failed(request, failure)
            else:
                request.done(step=step, paths=[save.result()["path"] for save in saves])

        for one in saves:
            one.add_done_callback(settled)

    def evaluate(self, request: Request, tick: Tick) -> Tick:
        """Evaluate, and let stages downstream see the results."""
        found: dict[str, float] = {}
        if "evaluate" not in self.answers:
            request.fail(
                "this run evaluates nothing: write ff.every(n, ff.evaluated(data)) before ff.controlled(inbox)"
            )
            return tick
        try:
            for answer in self.answers["evaluate"]:
                found.update(answer(tick).result())
        except interrupt.Interrupted:
            request.fail("the run was told to end")
            return tick
        except NonFiniteError:
            raise
        except Exception as error:
            if self.world.size > 1:  # the others are in the middle of it, and would wait for this one
                raise
            self._failed(request, f"{type(error).__name__}: {error}")
            return tick
        request.done(step=tick.state.step, results=found)
        return attrs.evolve(tick, results={**tick.results, **found})

    def stop(self, request: Request, tick: Tick) -> Tick:
        self.ends.append(request)
        return tick

    def abort(self, request: Request, tick: Tick) -> Tick:
        self.ends.append(request)
        raise known_to_all(Aborted(tick.state.step))

    def leave(self) -> None:
        """Abort between two microbatches, or two batches of an evaluation."""
        if self.inbox.asked_to_abort():
            raise Aborted(self.step)

    def ended(self) -> None:
        """Answer those who asked for the end, now that everything upstream has been saved and closed."""
        checkpoint = self._newest()
        for request in self.ends:
            request.done(step=self.step, checkpoint=checkpoint)
        self.inbox.fail_all(f"the run ended at step {self.step} before it")

    def broke(self, error: BaseException) -> None:
        """Answer what an exception leaves: an abort is done, everything else is not."""
        if not isinstance(error, Aborted):
            reason = f"the run ended at step {self.step} by {type(error).__name__}: {error}"
            self.inbox.last_error = reason
            for request in self.ends:
                request.fail(reason)
            self.inbox.fail_all(reason)
            return
        logger.warning("aborted at step %d, as was asked for; nothing was saved", self.step)
        while (waiting := self.inbox.take()) is not None:
            self.ends.append(waiting)
        for request in self.ends:
            if request.command is Command.ABORT:
                request.done(step=self.step, checkpoint=self._newest())
        self.inbox.fail_all(f"the run was aborted at step {self.step}")

    def _failed(self, request: Request, reason: str) -> None:
        self.inbox.last_error = f"step {self.step}: {request.command}: {reason}"
        logger.warning("%s", self.inbox.last_error)
        request.fail(reason)

    def _newest(self) -> str | None:
        newest = latest(self.inbox.run) if self.inbox.run is not None else None
        return str(newest.path) if newest else None


_ACTIONS: Final[Mapping[Command, Callable[[_Control, Request, Tick], Tick]]] = {
    Command.SAVE: _Control.save,
    Command.STOP: _Control.stop,
    Command.SAVE_STOP: _Control.save_stop,
    Command.ABORT: _Control.abort,
    Command.EVALUATE: _Control.evaluate,
}


def _begun(answer: Answer, tick: Tick) -> "Future[Mapping[str, Any]]":
    """Begin what was asked for; what fails at once fails in the same way as what fails later."""
    try:
        return answer(tick)
    except Exception as error:
        failed: Future[Mapping[str, Any]] = Future()
        failed.set_exception(error)
        return failed


def _failure(saves: "list[Future[Mapping[str, Any]]]") -> str | None:
    """Wait for saves, and say what went wrong with the first that failed."""
    errors = [error for save in saves if (error := save.exception()) is not None]
    if not errors:
        return None
    return str(errors[0]) if isinstance(errors[0], ValueError) else f"{type(errors[0]).__name__}: {errors[0]}"


def _number(value: Any) -> float | None:
    """Bring a metric to the host; None for one that is not a number, such as a table of norms."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
