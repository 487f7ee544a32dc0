"""The upper levels of the hierarchy: what every trainer can do, and callbacks."""

import abc
from typing import Any

from forgather.ml.trainer.callbacks import CallbackHandler, DefaultFlowCallback


class AbstractBaseTrainer(abc.ABC):
    """What every trainer can do."""

    @abc.abstractmethod
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model."""

    @abc.abstractmethod
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model."""

    @abc.abstractmethod
    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model to a directory."""


class ExtensibleTrainer(AbstractBaseTrainer):
    """A trainer with callbacks.

    Attributes:
        callback_handler: Holds them, in order, and calls them.
    """

    callback_handler: CallbackHandler

    def __init__(self, callbacks: Any = ()) -> None:
        self.callback_handler = CallbackHandler([DefaultFlowCallback, *(callbacks or ())])

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or an instance of a callback class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and give it; None if there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class."""
        self.callback_handler.remove_callback(callback)
