"""Logs as a JSON file."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgather.ml.trainer.callbacks.base import Logs, TrainerCallback
from forgather.ml.trainer.callbacks.place import logging_dir
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState
from forgather_fn.reports.path import content_of, replace

NAME = "trainer_logs.json"

_END = b"\n]"


class JsonLogger(TrainerCallback):
    """Append logs to ``trainer_logs.json``: one list, of an object for each log with the time, step and epoch.

    The file is whole JSON after each log. When a run is resumed, logs beyond the step that it is resumed at go, and so
    does a last one that a kill cut off. The first process writes.

    Args:
        path: The file; None for ``trainer_logs.json`` in the ``logging_dir`` of the arguments.
        clock: Gives seconds since 1970.
        meta: What every run begins its logs with: an object of these values.
    """

    def __init__(self, path: str | Path | None = None, clock: Callable[[], float] = time.time, **meta: Any) -> None:
        self.path = None if path is None else Path(path)
        self.meta = meta
        self._clock = clock

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Settle what an earlier attempt left, and write the values that were given."""
        if not state.is_world_process_zero:
            return
        path = self._place(args)
        step = state.global_step
        kept = [one for one in read(path) if one["global_step"] <= step] if step else []
        _replace(path, kept)
        if self.meta and not kept:
            self._append(state, self.meta)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any) -> None:
        """Append one log."""
        if state.is_world_process_zero:
            self._place(args)
            self._append(state, logs or {})

    def _place(self, args: Any) -> Path:
        if self.path is None:
            self.path = logging_dir(args) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path

    def _append(self, state: TrainerState, values: Mapping[str, Any]) -> None:
        assert self.path is not None
        stamp = {"timestamp": self._clock(), "global_step": state.global_step, "epoch": state.epoch}
        text = json.dumps(stamp | {name: _plain(value) for name, value in values.items()})
        if not _is_whole(self.path):
            _replace(self.path, read(self.path))
        with self.path.open("r+b") as file:
            # One object more goes in before the end.
            end = file.seek(-len(_END), os.SEEK_END)
            file.write((("," if end > 1 else "") + f"\n{text}\n]").encode())


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read the logs of a file that a JsonLogger wrote, up to where a kill may have cut it.

    Returns:
        The logs, oldest first; none if there is no file.

    Raises:
        ValueError: It is something else.
    """
    try:
        text = content_of(path).decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of a JsonLogger: {error}") from None
    lines = text.split("\n")
    if text and lines[0] != "[":
        raise ValueError(f"{path} is no file of a JsonLogger, which begins with a line '[': {lines[0][:80]!r}")
    found = []
    for line in lines[1:]:
        try:
            found.append(json.loads(line.removesuffix(",")))
        except (ValueError, RecursionError):
            break
    return found


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError:  # there is none, or it is shorter
        return False


def _replace(path: Path, logs: list[dict[str, Any]]) -> None:
    replace(path, ("[" + ",".join(f"\n{json.dumps(one)}" for one in logs) + "\n]").encode())


def _plain(value: Any) -> Any:
    """Bring a value to what JSON holds: numbers that are not finite, and all else that it does not, become texts."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if isinstance(value, torch.Tensor | np.ndarray | np.generic) else str(value)
