"""Logging: what is recorded, shown, and written to files."""

import json
import math
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch

from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.trainer_types import speed_metrics
from forgather_fn.mean import Mean

KEPT = 64
"""Losses that are kept on the device at most before they are added up."""


@attrs.define(eq=False)
class Losses:
    """The losses of steps, added up when somebody looks, so that no step waits for the device.

    Attributes:
        filtered: Whether a loss that is not finite counts as the mean of those before it, as in transformers.
        since: The sum since the last log.
        before: The sum of all before.
    """

    filtered: bool
    since: float = 0.0
    before: float = 0.0
    _added: int = 0
    _pending: list[Any] = attrs.field(factory=list)

    def add(self, loss: Mean | torch.Tensor) -> None:
        """Take the loss of a step."""
        self._pending.append(loss)
        if len(self._pending) >= KEPT:
            self._settle()

    def _settle(self) -> None:
        for loss in self._pending:
            value = float(loss)
            if self.filtered and not math.isfinite(value):
                value = self.since / max(self._added, 1)
            self.since += value
            self._added += 1
        self._pending.clear()

    def sum_since(self) -> float:
        """Give the sum since the last log."""
        self._settle()
        return self.since

    def drained(self) -> float:
        """Give the sum since the last log, and begin anew."""
        self._settle()
        total, self.since = self.since, 0.0
        self.before += total
        self._added = 0
        return total

    def total(self) -> float:
        """Give the sum of all."""
        self._settle()
        return self.before + self.since


class LogMixin(Attributes):
    """The part of a trainer that logs."""

    _initial_num_input_tokens_seen: int
    _flops: float

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record values, and tell callbacks. Override it to add some.

        Args:
            logs: By name; ``epoch`` is added. The same dict goes to ``on_log``, which has no ``step``.
            start_time: Of the training, in seconds; for the tokens per second, where tokens are counted.
        """
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                tokens = self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen
                logs.update(speed_metrics("train", start_time, num_tokens=tokens))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def floating_point_ops(self, inputs: Any) -> float:
        """Estimate the operations of forward and backward on a microbatch: 6 for each token and parameter."""
        model: Any = self.model
        name = getattr(model, "main_input_name", "input_ids")
        if isinstance(inputs, Mapping) and name in inputs and hasattr(model, "num_parameters"):
            if not self._flops:
                self._flops = 6.0 * model.num_parameters(exclude_embeddings=True)
            return self._flops * int(inputs[name].numel())
        return 0

    def store_flos(self) -> None:
        """Add the operations counted since the last call to the state."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0.0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self.state.num_input_tokens_seen += self._input_tokens(inputs)

    def _input_tokens(self, inputs: Any) -> int:
        """Count the tokens of a microbatch; none where that was not asked for."""
        kind = self.args.include_num_input_tokens_seen
        if kind in ("no", False):
            return 0
        name = getattr(self.model, "main_input_name", "input_ids")
        if not isinstance(inputs, Mapping) or name not in inputs:
            raise ValueError(
                f"include_num_input_tokens_seen={kind!r}, but the batch has no {name!r} to count: add a "
                "`main_input_name` attribute to the model, which names its input"
            )
        padding = getattr(self.processing_class, "pad_token_id", None)
        if kind == "non_padding" and "attention_mask" in inputs:
            return int(inputs["attention_mask"].sum())
        if kind == "non_padding" and padding is not None:
            return int((inputs[name] != padding).sum())
        return int(inputs[name].numel())

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print metrics as a table.

        Args:
            split: ``"train"``, ``"eval"``, ``"test"``, or another name.
            metrics: By name.
        """
        if not self.is_world_process_zero():
            return
        shown = self.metrics_format(metrics)
        left, right = max(map(len, shown)), max(len(str(value)) for value in shown.values())
        rows = [f"  {name: <{left}} = {shown[name]:>{right}}" for name in sorted(shown)]
        print("\n".join([f"***** {split} metrics *****", *rows]))  # noqa: T201 - what it is for

    def metrics_format(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Write metrics for people."""
        shown: dict[str, Any] = {}
        for name, value in metrics.items():
            if "_mem_" in name:
                shown[name] = f"{int(value) >> 20}MB"
            elif "_runtime" in name:
                whole = str(timedelta(seconds=int(value)))
                shown[name] = f"{whole}.{int(abs(value - int(value)) * 100):02d}"
            elif name == "total_flos":
                shown[name] = f"{int(value) >> 30}GF"
            else:
                shown[name] = round(value, 4) if isinstance(value, float) else value
        return shown

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write metrics to ``<split>_results.json``, and add them to ``all_results.json``."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        _write(folder / f"{split}_results.json", metrics)
        if combined:
            path = folder / "all_results.json"
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            _write(path, {**before, **metrics})

    def save_state(self) -> None:
        """Write the state to ``trainer_state.json`` in the output directory."""
        if self.is_world_process_zero():
            self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))

    def is_world_process_zero(self) -> bool:
        """Tell whether this is the first process of the job."""
        return bool(self.args.process_index == 0)

    def is_local_process_zero(self) -> bool:
        """Tell whether this is the first process on its machine."""
        return bool(self.args.local_process_index == 0)


def _write(path: Path, metrics: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=4, sort_keys=True), encoding="utf-8")
