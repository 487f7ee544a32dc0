"""Saving the model, and checkpoints in the layout of Hugging Face, each written whole or not at all."""

import contextlib
import logging
import os
import random
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

from forgather.ml.trainer.logs import LogMixin
from forgather.ml.trainer.weights import is_pretrained, write_weights
from forgather_fn import scaling
from forgather_fn.checkpoint import catalog
from forgather_fn.checkpoint.commit import Session, discard, seal, staged, sweep
from forgather_fn.checkpoint.lock import NAME as LOCK
from forgather_fn.checkpoint.lock import locked
from forgather_fn.checkpoint.manifest import NAME as MANIFEST

logger = logging.getLogger(__name__)

PREFIX = "checkpoint"


@attrs.define(eq=False)
class Writing:
    """The output directory of a training that saves: its lock, held from the first save to the end.

    Attributes:
        folder: The output directory.
        stack: What is to be undone at the end.
        session: Of the core's checkpoints; None before the first save.
        staging: Where the checkpoint that is being written lies, if one is.
    """

    folder: Path
    stack: contextlib.ExitStack
    session: Session | None = None
    staging: Path | None = None

    def open(self) -> Session:
        """Take the lock, and remove what earlier saves left half done."""
        if self.session is None:
            self.stack.enter_context(_locked(self.folder))
            known = [entry.manifest.run for entry in catalog.list_checkpoints(self.folder) if entry.manifest]
            sweep(self.folder)
            self.session = Session(self.folder, known[-1] if known else secrets.token_hex(8), secrets.token_hex(8))
        return self.session


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a directory's lock, and leave no file of it behind."""
    with locked(folder):
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                (folder / LOCK).unlink()


class SavingMixin(LogMixin):
    """The part of a trainer that writes models and checkpoints."""

    _writing: Writing | None
    _engine: Any

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """Make ready to save for the time of a training."""
        with contextlib.ExitStack() as stack:
            self._writing = Writing(Path(self.args.output_dir).absolute(), stack)
            try:
                yield
            finally:
                self._writing = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, its configuration, the tokenizer and the arguments, for ``from_pretrained`` and others.

        Args:
            output_dir: Where; the trainer's output directory if not given.
        """
        if self.args.should_save:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        os.makedirs(folder, exist_ok=True)
        model: Any = getattr(self.model, "_orig_mod", self.model)  # what torch.compile has wrapped
        if is_pretrained(model):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            write_weights(self.model, Path(folder), state_dict)
        processing = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None and hasattr(processing, "save_pretrained"):
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _get_output_dir(self, trial: Any = None) -> str:
        """Give the directory in which ``_save_checkpoint`` makes ``checkpoint-<step>``.

        While a checkpoint is being written this is a temporary one: what is written there is committed as a whole.
        """
        del trial
        if self._writing is not None and self._writing.staging is not None:
            return str(self._writing.staging)
        return str(self.args.output_dir)

    def _commit_checkpoint(self) -> None:
        """Write a checkpoint aside, by :meth:`_save_checkpoint`, and move it in when it is whole; then rotate.

        The first process writes; no other goes on before it has, and if it fails, all fail.
        """
        self.state.best_model_checkpoint = self._world.each(self._commit_own)[0]

    def _commit_own(self) -> str | None:
        """Commit a checkpoint, where this process writes, and name the best one."""
        if self.args.should_save:
            self._write_checkpoint()
        best: str | None = self.state.best_model_checkpoint
        return best

    def _write_checkpoint(self) -> None:
        writing = self._writing
        assert writing is not None
        session = writing.open()
        name = f"{PREFIX}-{self.state.global_step}"
        writing.staging = staged(session, self.state.global_step)
        try:
            self._save_checkpoint(self.model, None)
            written = writing.staging / name
            if not written.is_dir():
                return  # an override that saves nothing, or elsewhere
            whole = staged(session, self.state.global_step)
            whole.rmdir()
            written.rename(whole)
            self._seal(session, whole)
        finally:
            shutil.rmtree(writing.staging, ignore_errors=True)
            writing.staging = None
        self._rotate_checkpoints(Path(self.args.output_dir))

    def _seal(self, session: Session, whole: Path) -> None:
        direct = session.directory / f"{PREFIX}-{self.state.global_step}"
        if direct.is_dir() and not (direct / "trainer_state.json").exists():
            # What an override wrote straight to the output directory belongs to the checkpoint as well.
            shutil.copytree(direct, whole, dirs_exist_ok=True)
        metrics = self._best_metrics()
        seal(session, whole, step=self.state.global_step, samples=self._samples(), metrics=metrics)

    def _best_metrics(self) -> dict[str, float]:
        last: dict[str, float] = next(
            (log for log in reversed(self.state.log_history) if any(n.startswith("eval_") for n in log)), {}
        )
        if last.get("step") != self.state.global_step:
            return {}
        return {name: float(value) for name, value in last.items() if isinstance(value, int | float)}

    def _samples(self) -> int:
        return int(self.state.global_step * self._train_batch_size * self._microbatches)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write ``checkpoint-<step>`` into :meth:`_get_output_dir`. Override it to write more, or other, files."""
        del model
        if self._writing is None or self._writing.staging is None:
            if self._writing is None:
                with self._session():
                    self._commit_checkpoint()
            else:
                self._commit_checkpoint()
            return
        self.store_flos()
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX}-{self.state.global_step}")
        self.save_model(folder, _internal_call=True)
        os.makedirs(folder, exist_ok=True)
        self._note_best()
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler_to(folder)
            if getattr(self.args, "save_rng_state", True):
                self._save_rng_state(folder)
        self.state.stateful_callbacks.update(self._exported_states())
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    def _note_best(self) -> None:
        """Name the checkpoint of the best step, once it is there or about to be."""
        best = self.state.best_global_step
        if not best or str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "no":
            return
        path = os.path.join(self.args.output_dir, f"{PREFIX}-{best}")
        if best == self.state.global_step or os.path.isdir(path):
            self.state.best_model_checkpoint = path

    def _exportable(self) -> list[Any]:
        held = [*self.callback_handler.callbacks, self.control]
        return [c for c in held if callable(getattr(c, "state", None)) and hasattr(c, "from_state")]

    def _exported_states(self) -> dict[str, Any]:
        from forgather.ml.trainer.trainer_types import exported

        return exported(self._exportable())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        args = self.args
        if getattr(args, "save_optimizer_state", True) and self.optimizer is not None:
            torch.save(self.optimizer.state_dict(), os.path.join(output_dir, "optimizer.pt"))
        if getattr(args, "save_scheduler_state", True) and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _save_scaler_to(self, output_dir: str) -> None:
        """Write the loss scale of float16 as ``torch.amp.GradScaler`` does."""
        held = {} if self._engine is None else self._engine.state.loss_scale
        if held:
            state = {
                "scale": float(held["scale"]),
                "growth_factor": scaling.GROWTH,
                "backoff_factor": scaling.BACKOFF,
                "growth_interval": scaling.INTERVAL,
                "_growth_tracker": int(held["growth_tracker"]),
            }
            torch.save(state, os.path.join(output_dir, "scaler.pt"))

    def _save_rng_state(self, output_dir: str) -> None:
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        torch.save(states, os.path.join(output_dir, "rng_state.pth"))

    def _rotate_checkpoints(self, folder: Path) -> None:
        kept = {self.state.best_model_checkpoint} if self.state.best_model_checkpoint else set()
        for path in superfluous(folder, self.args.save_total_limit, {Path(k).absolute() for k in kept}):
            with contextlib.suppress(OSError):
                discard(path)

    def _keep_only_best(self) -> None:
        """With ``save_total_limit=1``, leave but the best checkpoint at the end, as transformers does."""
        best = self.state.best_model_checkpoint
        if not (self.args.should_save and best is not None and self.args.save_total_limit == 1 and os.path.isdir(best)):
            return
        for entry in catalog.list_checkpoints(self.args.output_dir):
            if not os.path.samefile(entry.path, best):
                discard(entry.path)


def superfluous(folder: Path, limit: int | None, protected: set[Path]) -> list[Path]:
    """List the checkpoints that may go, oldest first: as many as are above the limit.

    Never the newest one, nor a protected one; what was never committed neither counts nor goes.

    Args:
        folder: The output directory.
        limit: How many are kept; None, or 0, for all.
        protected: The best, for example; it counts.
    """
    if not limit or limit < 0:
        return []
    held = [entry.path.absolute() for entry in catalog.list_checkpoints(folder) if _was_committed(entry)]
    if len(held) <= limit:
        return []
    protected = (protected & set(held)) | {held[-1]}
    number = len(held) - max(limit, len(protected))
    return [path for path in held if path not in protected][:number]


def _was_committed(entry: catalog.Entry) -> bool:
    """Tell whether a checkpoint was committed, whatever callbacks and users have done to its files since."""
    foreign = not (entry.path / MANIFEST).exists() and (entry.path / "trainer_state.json").is_file()
    return entry.manifest is not None or foreign
