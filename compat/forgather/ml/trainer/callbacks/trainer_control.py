"""Control of a training from outside: ``forgather control`` and whatever else posts commands."""

import atexit
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from forgather.ml.trainer.callbacks.base import Logs, TrainerCallback
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState
from forgather_fn import interrupt
from forgather_fn.checkpoint import latest
from forgather_fn.control import Aborted, Command, Inbox
from forgather_fn.control.agreement import Agree, agreeing
from forgather_fn.control.inbox import Request
from forgather_fn.control.progress import Numbers, Progress
from forgather_fn.control.serving import serve
from forgather_fn.world import ALONE, World, known_to_all


class TrainerControlCallback(TrainerCallback):
    """Let ``forgather control`` see and command a training: save, evaluate, stop, save-stop, abort, status.

    Commands act after the update that is running, whatever the logging interval; an abort also between its microbatches
    where the training is of one process. A stop saves first, where the arguments have a strategy of saving. An abort
    raises :class:`~forgather_fn.control.stage.Aborted`, so that nothing after ``train`` writes the model either. The
    loss that a status tells is the one that was logged last.

    Args:
        job_id: The job's id; None for the name of ``output_dir``, with a number where another job has it.
        port: Listen on this port of TCP, with a token, instead of a Unix socket; 0 for one that is free.
        host: The IP address for that; None for 127.0.0.1.
        enable_http: Whether to serve at all. Without, only :attr:`inbox` takes commands, from this process.
        token: What clients must show over TCP; None for a new one.
        remote: Allow a host that other machines reach; it needs a token.

    Attributes:
        inbox: What the training was asked for; None outside one.

    Raises:
        ValueError: When the training begins: id, host or token cannot be used.
    """

    def __init__(
        self,
        job_id: str | None = None,
        port: int | None = None,
        host: str | None = None,
        enable_http: bool = True,
        *,
        token: str | None = None,
        remote: bool = False,
    ) -> None:
        self.place: dict[str, Any] = {"job_id": job_id, "port": port, "host": host, "token": token, "remote": remote}
        self.enable_http = enable_http
        self.inbox: Inbox | None = None
        self._stack = contextlib.ExitStack()
        self._asked: dict[str, list[Request]] = {}
        self._sent: list[Request] = []
        self._agree: Agree = agreeing(ALONE)
        self._samples_per_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to serve."""
        self._close()
        world = _world()
        run = Path(args.output_dir).absolute()
        served = serve(run, **self.place) if self.enable_http and world.main else contextlib.nullcontext(Inbox(run))
        inbox = self.inbox = self._stack.enter_context(served)
        self._samples_per_step = int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
        samples = state.global_step * self._samples_per_step
        at = state.global_step, samples, inbox.clock()
        inbox.progress = Progress(state.global_step, state.max_steps, lambda samples: state.epoch, at)
        inbox.world_size = world.size
        self._agree = agreeing(world)
        if world.size == 1:
            self._stack.enter_context(interrupt.watching(lambda: self._leave(state)))
        atexit.register(self._close)  # a training that fails has no event of its end
        self._stack.callback(atexit.unregister, self._close)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell where the training is, and ask it for what is due."""
        inbox = self.inbox
        if inbox is None or inbox.progress is None:
            return
        self._fail_asked("the trainer has not done it")
        inbox.progress.advance(state.global_step, state.global_step * self._samples_per_step, inbox.clock())
        if inbox.looked_for():
            inbox.show(_numbers(inbox, state, kwargs))
        mine = inbox.take() if state.is_world_process_zero else None
        if mine is not None:
            self._sent.append(mine)
        command = self._agree(mine.command if mine else None)
        if command is not None:
            request = self._sent.pop(0) if state.is_world_process_zero else Request(command)
            self._act(request, args, state, control, kwargs)

    def _act(
        self, request: Request, args: Any, state: TrainerState, control: TrainerControl, kwargs: Mapping[str, Any]
    ) -> None:
        command = request.command
        if command is Command.ABORT:
            self._abort(request, state)
        if command is Command.EVALUATE:
            if _name(args.eval_strategy) == "no" and kwargs.get("eval_dataloader") is None:
                request.fail("this training evaluates nothing: give eval_dataset and eval_strategy")
                return
            control.should_evaluate = True
            self._asked.setdefault("evaluate", []).append(request)
            return
        if command is Command.SAVE or command is Command.SAVE_STOP or _name(args.save_strategy) in ("steps", "epoch"):
            control.should_save = True
        if command is Command.SAVE:
            self._asked.setdefault("save", []).append(request)
        else:
            control.should_training_stop = True
            self._asked.setdefault("end", []).append(request)

    @property
    def asked_to_evaluate(self) -> bool:
        """Whether somebody waits for an evaluation."""
        return bool(self._asked.get("evaluate"))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any) -> None:
        """Keep what was logged, for those who ask."""
        if self.inbox is not None and "loss" in (logs or {}):
            values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self.inbox.numbers = Numbers(state.global_step, self.inbox.clock(), values)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer those who asked for a save."""
        path = Path(args.output_dir).absolute() / f"checkpoint-{state.global_step}"
        for request in self._asked.pop("save", ()):
            request.done(step=state.global_step, paths=[str(path)])

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Logs = None, **kwargs: Any
    ) -> None:
        """Answer those who asked for an evaluation."""
        found = {name: value for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        for request in self._asked.pop("evaluate", ()):
            request.done(step=state.global_step, results=found)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer those who asked for the end, and end serving."""
        for request in self._asked.pop("end", ()):
            request.done(step=state.global_step, checkpoint=self._newest())
        self._close()

    def _leave(self, state: TrainerState) -> None:
        """Abort between two microbatches."""
        inbox = self.inbox
        if inbox is not None and inbox.asked_to_abort():
            while (request := inbox.take()) is not None:
                if request.command is Command.ABORT:
                    self._abort(request, state)
                request.fail(_ABORTED)

    def _abort(self, request: Request, state: TrainerState) -> None:
        self._fail_asked(_ABORTED)
        request.done(step=state.global_step, checkpoint=self._newest())
        self._close()
        raise known_to_all(Aborted(state.global_step))

    def _fail_asked(self, reason: str) -> None:
        for name in ("save", "evaluate"):
            for request in self._asked.pop(name, ()):
                request.fail(reason)

    def _newest(self) -> str | None:
        newest = latest(self.inbox.run) if self.inbox is not None and self.inbox.run is not None else None
        return str(newest.path) if newest else None

    def _close(self) -> None:
        """End serving, and answer whoever still waits."""
        if self.inbox is not None:
            self.inbox.end("the training has ended")
        self.inbox = None
        self._asked, self._sent = {}, []
        self._stack.close()


_ABORTED: Final = "the training was aborted"


def _numbers(inbox: Inbox, state: TrainerState, kwargs: Mapping[str, Any]) -> Numbers:
    """Give what was logged last, with the learning rate of now."""
    logged = inbox.numbers
    values = dict(logged.values) if logged else {}
    if kwargs.get("optimizer") is not None:
        values["learning_rate"] = float(kwargs["optimizer"].param_groups[0]["lr"])
    return Numbers(logged.step if logged else state.global_step, inbox.clock(), values)


def _name(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def _world() -> World:
    """Find the processes of this training, as torch.distributed knows them."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return ALONE
    control = distributed.new_group(backend="gloo")
    return World(distributed.get_rank(), distributed.get_world_size(), control=control)
