"""Going on from a checkpoint, whoever wrote it: this package or transformers."""

import functools
import logging
import os
import random
import reprlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from forgather.ml.trainer.saving import SavingMixin
from forgather.ml.trainer.trainer_types import TrainerState
from forgather.ml.trainer.unharmed import (
    OPTIMIZER,
    RNG,
    SCALER,
    SCHEDULER,
    STATE,
    check_whole,
    newest_checkpoint,
)
from forgather.ml.trainer.weights import (
    ADAPTER,
    INDEX,
    OLD_ADAPTER,
    OLD_INDEX,
    OLD_WEIGHTS,
    WEIGHTS,
    has,
    has_adapters,
    read_weights,
    unpickled,
)
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.reading import UNREADABLE

logger = logging.getLogger(__name__)


class ResumingMixin(SavingMixin):
    """The part of a trainer that reads checkpoints."""

    _engine: Any

    def _checkpoint_to_resume(self, given: Any) -> str | None:
        """Find the checkpoint that is meant, and make sure that it is whole; the first process does, for all.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        if given is None or given is False:
            return None
        return self._world.first(lambda: self._whole_checkpoint(given))

    def _whole_checkpoint(self, given: Any) -> str:
        if given is True:
            found = newest_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")
            return found
        path = str(os.fspath(given))
        files = (WEIGHTS, INDEX, ADAPTER, OLD_WEIGHTS, OLD_INDEX, OLD_ADAPTER)
        if not any(has(path, name) for name in files) and not has_adapters(path):
            raise ValueError(f"Can't find a valid checkpoint at {path}")
        check_whole(Path(path))
        return path

    def _batch_size_of(self, resumed: str | None) -> int:
        if resumed is not None and has(resumed, STATE):
            size = TrainerState.load_from_json(os.path.join(resumed, STATE)).train_batch_size
            if size is not None:
                return size
        return int(self.args.train_batch_size)

    def _resume_state(self, resumed: str) -> None:
        """Read the trainer's state; intervals are those of the state, as in transformers."""
        path = os.path.join(resumed, STATE)
        if not os.path.isfile(path):
            return
        self.state = TrainerState.load_from_json(path)
        best = self.state.best_model_checkpoint
        if best is not None and not os.path.isdir(best):
            logger.warning(
                "The best checkpoint %s recorded in the resumed state does not exist anymore. Ignoring it for this "
                "run.",
                best,
            )
            self.state.best_model_checkpoint = None
        self._warn_of_differences()
        if self.args.restore_callback_states_from_checkpoint:
            self._restore_callbacks()

    def _warn_of_differences(self) -> None:
        pairs = {name: (getattr(self.args, name), getattr(self.state, name)) for name in _COMPARED}
        pairs["per_device_train_batch_size"] = (self.args.per_device_train_batch_size, self.state.train_batch_size)
        unlike = [
            f"\n\t{n}: {a} (from args) != {s} (from {STATE})" for n, (a, s) in pairs.items() if a != s and a and s
        ]
        if unlike:
            logger.warning(
                "Warning: The following arguments do not match the ones in the `%s` within the checkpoint directory: "
                "%s",
                STATE,
                "".join(unlike),
            )

    def _restore_callbacks(self) -> None:
        """Give callbacks, and the control, the state that they had; each is made anew from it."""
        held = [*self.callback_handler.callbacks, self.control]
        missing = []
        for name, states in self.state.stateful_callbacks.items():
            alike = [callback for callback in held if type(callback).__name__ == name]
            if not alike:
                missing.append(name)
            for callback, state in zip(alike, states if isinstance(states, list) else [states], strict=False):
                try:
                    made = type(callback)(**state.get("args", {}))
                    for attribute, value in state.get("attributes", {}).items():
                        setattr(made, attribute, value)
                except UNREADABLE as error:
                    given = f"{STATE}: stateful_callbacks has {reprlib.repr(state)}"
                    raise CheckpointError(f"{given}, of which no {name} can be made: {error}") from None
                if callback is self.control:
                    self.control = made
                else:
                    callbacks = self.callback_handler.callbacks
                    callbacks[callbacks.index(callback)] = made
        if missing:
            logger.warning(
                "Checkpoint included callbacks not included in current configuration. Ignoring. (%s)",
                ", ".join(missing),
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read weights into the model.

        Raises:
            ValueError: There are none.
        """
        model = self.model if model is None else model
        read_weights(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Read the weights of the best checkpoint into the live model."""
        best = self.state.best_model_checkpoint
        logger.info("Loading best model from %s (score: %s).", best, self.state.best_metric)
        read_weights(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the states of optimizer and scheduler, where they were saved."""
        if checkpoint is None:
            return
        if not (has(checkpoint, OPTIMIZER) and has(checkpoint, SCHEDULER)):
            logger.warning("%s holds no states of optimizer and scheduler: both begin anew", checkpoint)
            return
        device = self.args.device if self.args.world_size > 1 else "cpu"
        if getattr(self.args, "restore_optimizer_state", True):
            path = os.path.join(checkpoint, OPTIMIZER)
            _take(path, self.optimizer.load_state_dict, unpickled(path, device))
        if getattr(self.args, "restore_scheduler_state", True):
            path = os.path.join(checkpoint, SCHEDULER)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # to save the optimizer too, which was done
                _take(path, self.lr_scheduler.load_state_dict, unpickled(path))

    def _load_scaler_of(self, checkpoint: str | None) -> None:
        """Read the loss scale of float16, where there is one."""
        held = self._engine.state.loss_scale
        if checkpoint is not None and held and has(checkpoint, SCALER):
            path = os.path.join(checkpoint, SCALER)
            _take(path, functools.partial(_set_scale, held), unpickled(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put the global generators where they were, before anything is fetched."""
        if checkpoint is None or not getattr(self.args, "restore_rng_state", True):
            return
        path = os.path.join(checkpoint, RNG)
        if not os.path.isfile(path):
            logger.info("Didn't find an RNG file in %s, reproducibility is not guaranteed.", checkpoint)
            return
        with torch.serialization.safe_globals(_numpy_names()):
            states = unpickled(path)
        _take(path, _set_generators, states)


def _take(path: str, take: Callable[[Any], object], found: Any) -> None:
    """Hand on what was read of a file.

    Raises:
        CheckpointError: It is not what is taken.
    """
    try:
        take(found)
    except (RuntimeError, IndexError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} does not fit: {type(error).__name__}: {str(error)[:500]}") from error


def _set_scale(held: Mapping[str, torch.Tensor], state: Any) -> None:
    held["scale"].fill_(state["scale"])
    held["growth_tracker"].fill_(state["_growth_tracker"])


def _set_generators(states: Any) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    cuda = states.get("cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda) if isinstance(cuda, list) else torch.cuda.set_rng_state(cuda)


_COMPARED = ("logging_steps", "eval_steps", "save_steps")


def _numpy_names() -> list[Any]:
    """Name what numpy's generator state is made of, so that it can be read without unpickling anything else."""
    core: Any = np._core if hasattr(np, "_core") else np.core
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def batch_of(path: str) -> tuple[int, int] | None:
    """Tell what the steps of a run were made of: how many microbatches, and samples in each of them.

    Returns:
        Both; None where a checkpoint does not tell, as those of transformers do not.
    """
    manifest = manifests.read(Path(path))
    if manifest is None or not manifest.step or not has(path, STATE):
        return None
    size = TrainerState.load_from_json(os.path.join(path, STATE)).train_batch_size
    if not size or manifest.samples % (manifest.step * size):
        return None
    return manifest.samples // (manifest.step * size), size
