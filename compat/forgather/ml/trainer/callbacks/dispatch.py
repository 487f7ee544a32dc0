"""Calling callbacks: all of them, in their order, and for nothing where nobody listens."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from forgather.ml.trainer.callbacks.base import EVENTS
from forgather.ml.trainer.trainer_types import TrainerControl
from forgather_fn.signature import shown

logger = logging.getLogger(__name__)


CLEARED: Final[Mapping[str, tuple[str, ...]]] = {
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_log": ("should_log",),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
}
"""The flags of the control that are cleared before an event's callbacks are called."""

FOURTH: Final[Mapping[str, str]] = {"on_log": "logs", "on_evaluate": "metrics", "on_predict": "metrics"}
"""What these events take as a fourth argument."""

_BASES: Final = {
    ("forgather.ml.trainer.callbacks.base", "TrainerCallback"),
    ("transformers.trainer_callback", "TrainerCallback"),
}

_INTEGRATIONS: Final = "transformers.integrations.integration_utils"
_COUNTERPARTS: Final[Mapping[tuple[str, str], str]] = {
    ("transformers.trainer_callback", "TrainerCallback"): "TrainerCallback",
    ("transformers.trainer_callback", "DefaultFlowCallback"): "DefaultFlowCallback",
    ("transformers.trainer_callback", "PrinterCallback"): "PrinterCallback",
    ("transformers.trainer_callback", "ProgressCallback"): "ProgressCallback",
    ("transformers.utils.notebook", "NotebookProgressCallback"): "ProgressCallback",
    ("transformers.trainer_callback", "EarlyStoppingCallback"): "EarlyStoppingCallback",
    (_INTEGRATIONS, "TensorBoardCallback"): "TBLogger",
}
"""The class here that does what one of transformers does, which is told by module and name: it is not imported."""


def is_of(callback: Any, kind: type) -> bool:
    """Tell whether a callback is of a class, or of the one here that a class of transformers stands for.

    Example:
        >>> from forgather.ml.trainer.callbacks import PrinterCallback, TrainerCallback
        >>> is_of(PrinterCallback(), TrainerCallback), is_of(TrainerCallback(), PrinterCallback)
        (True, False)
    """
    name = _counterpart(kind)
    return isinstance(callback, kind) or name in [base.__name__ for base in type(callback).__mro__ if _is_here(base)]


def _counterpart(kind: type) -> str | None:
    return _COUNTERPARTS.get((kind.__module__, kind.__name__))


def _is_here(kind: type) -> bool:
    return kind.__module__.startswith("forgather.ml.trainer.callbacks.")


def _known(kind: type) -> type | str:
    """Give what tells whether two callbacks are of one class, or of two of which one stands for the other."""
    return kind.__name__ if _is_here(kind) else _counterpart(kind) or kind


def overrides(callback: Any, event: str) -> bool:
    """Tell whether a callback does anything at an event: whether it has a method of the name that is not its base's.

    Example:
        >>> from forgather.ml.trainer.callbacks import PrinterCallback
        >>> overrides(PrinterCallback(), "on_log"), overrides(PrinterCallback(), "on_step_end")
        (True, False)
    """
    if event in getattr(callback, "__dict__", ()):
        return True
    for kind in type(callback).__mro__:
        if event in vars(kind):
            return (kind.__module__, kind.__name__) not in _BASES
    return callable(getattr(callback, event, None))


def is_default_flow(callback: Any) -> bool:
    """Tell whether a callback is, or derives from, a DefaultFlowCallback: ours or transformers'."""
    return any(kind.__name__ == "DefaultFlowCallback" for kind in type(callback).__mro__)


class CallbackHandler:
    """The callbacks of a trainer.

    Which of them override an event is looked up when the event first comes; an event that none overrides costs one
    look in a dictionary. What counts is whether the method differs from the base's, so that instances of transformers'
    own ``TrainerCallback`` and of any class with methods of these names are called alike.

    Attributes:
        callbacks: In the order in which they are called. Change it through the methods, or anyhow: it is compared.
        model: What each event gets under this name; so are the next five.
        processing_class: As above.
        optimizer: As above.
        lr_scheduler: As above.
        train_dataloader: As above.
        eval_dataloader: As above.
    """

    def __init__(
        self,
        callbacks: Iterable[Any],
        model: Any = None,
        processing_class: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
    ) -> None:
        self.callbacks: list[Any] = []
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        self._seen: list[Any] = []
        self._listeners: dict[str, list[Any]] = {}
        for one in callbacks:
            self.add_callback(one)
        if not any(is_default_flow(one) for one in self.callbacks):
            logger.warning(
                "Without a DefaultFlowCallback a trainer neither logs, evaluates nor saves, and does not end. Add one "
                "with trainer.add_callback(DefaultFlowCallback). The callbacks are:\n%s",
                self.callback_list,
            )

    def add_callback(self, callback: Any) -> None:
        """Add one, or one of a class, as the last.

        Raises:
            ValueError: It has no method of any event, and would never be called.
        """
        made = callback() if isinstance(callback, type) else callback
        if not any(callable(getattr(made, event, None)) for event in EVENTS):
            raise ValueError(
                f"{shown(callback)} is no callback: it has no method of an event, such as on_log or on_step_end; "
                "derive it from forgather.ml.TrainerCallback"
            )
        if _known(type(made)) in [_known(type(one)) for one in self.callbacks]:
            logger.warning(
                "You are adding a %s to the callbacks of this Trainer, but there is one already. They are:\n%s",
                type(made),
                self.callback_list,
            )
        self.callbacks.append(made)

    def pop_callback(self, callback: Any) -> Any:
        """Take one out, or the first of a class, and return it; None if there is none.

        A class of transformers, such as ``PrinterCallback``, stands for the one here of the same use too.
        """
        for one in self.callbacks:
            if is_of(one, callback) if isinstance(callback, type) else one == callback:
                self.callbacks.remove(one)
                return one
        return None

    def remove_callback(self, callback: Any) -> None:
        """Take one out, or the first of a class, if there is one.

        Raises:
            ValueError: A callback that is not a class is not there.
        """
        if self.pop_callback(callback) is None and not isinstance(callback, type):
            raise ValueError(f"{callback!r} is not among the callbacks:\n{self.callback_list}")

    @property
    def callback_list(self) -> str:
        """The names of the callbacks' classes, one a line."""
        return "\n".join(type(one).__name__ for one in self.callbacks)

    def listens(self, event: str) -> bool:
        """Tell whether any callback overrides an event."""
        return bool(self._of(event))

    def call_event(
        self, event: str, args: Any, state: Any, control: TrainerControl, *fourth: Any, **kwargs: Any
    ) -> TrainerControl:
        """Call an event of all callbacks; the control that one returns is what the next one gets.

        Also callable as ``on_x(args, state, control, ...)``. What a callback raises is raised, with the names of the
        callback and the event in its text.
        """
        for flag in CLEARED.get(event, ()):
            setattr(control, flag, False)
        listeners = self._of(event)
        if not listeners:
            return control
        kwargs.update(zip((FOURTH[event],) if fourth else (), fourth, strict=True))
        for callback in listeners:
            try:
                answer = getattr(callback, event)(
                    args,
                    state,
                    control,
                    model=self.model,
                    processing_class=self.processing_class,
                    optimizer=self.optimizer,
                    lr_scheduler=self.lr_scheduler,
                    train_dataloader=self.train_dataloader,
                    eval_dataloader=self.eval_dataloader,
                    **kwargs,
                )
            except Exception as error:
                _name(error, f"in the callback {type(callback).__name__}, {event}")
                raise
            if answer is not None:
                control = answer
        return control

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the events, which are added below

    def _of(self, event: str) -> list[Any]:
        if self._seen != self.callbacks:
            self._seen, self._listeners = list(self.callbacks), {}
        if event not in self._listeners:
            self._listeners[event] = [one for one in self.callbacks if overrides(one, event)]
        return self._listeners[event]


def _method(event: str) -> Callable[..., TrainerControl]:
    def call(
        self: CallbackHandler, args: Any, state: Any, control: TrainerControl, *fourth: Any, **kwargs: Any
    ) -> TrainerControl:
        return self.call_event(event, args, state, control, *fourth, **kwargs)

    return call


for _event in EVENTS:
    setattr(CallbackHandler, _event, _method(_event))


def _name(error: Exception, where: str) -> None:
    """Say in an error where it came from; its type stays, so that whoever waits for it still gets it."""
    if len(error.args) == 1 and str(error) == error.args[0]:
        error.args = (f"{error.args[0]} [{where}]",)
    else:
        error.add_note(where)
