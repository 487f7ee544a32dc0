"""Which checkpoints training can go on from: those that are whole, or were changed where it does no harm."""

import logging
import warnings
from pathlib import Path
from typing import Final

import attrs

from forgather.ml.trainer.trainer_types import TrainerState
from forgather.ml.trainer.weights import ADAPTER, INDEX, OLD_INDEX, OLD_WEIGHTS, WEIGHTS, has, has_adapters
from forgather_fn.checkpoint import catalog, header
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.foreign import files_of
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.reading import UNREADABLE

logger = logging.getLogger(__name__)

STATE, OPTIMIZER, SCHEDULER, RNG = "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"
SCALER = "scaler.pt"
_NEVER_READ: Final = ("training_args.bin", "config.json", "generation_config.json", "README.md")


def newest_checkpoint(folder: str | Path) -> str | None:
    """Find the whole checkpoint of a run that was committed last; None if there is none.

    Those that transformers wrote are found too, adapters of PEFT among them.
    """
    for entry in reversed(catalog.list_checkpoints(folder)):
        if entry.whole or _can_be_read(entry):
            return str(entry.path)
        logger.warning("%s is passed over: %s", entry.path, "; ".join(entry.faults))
    return None


def _can_be_read(entry: catalog.Entry) -> bool:
    """Tell whether training can go on from what is not as it was saved, or has no ``model.safetensors``."""
    if entry.manifest is None:
        weights = has_adapters(entry.path) or has(entry.path, OLD_WEIGHTS) or has(entry.path, OLD_INDEX)
        return weights and has(entry.path, STATE) and not has(entry.path, manifests.NAME)
    try:
        check_whole(entry.path)
    except (CheckpointError, OSError):
        return False
    return True


def check_whole(path: Path) -> None:
    """Compare a checkpoint with its manifest, if it has one.

    Some changes are accepted, with a warning: weights that another tool has split or joined since, if they are whole by
    themselves; and what callbacks and users do to files that training can go on without (see :func:`_is_spared`).

    Raises:
        CheckpointError: A file is missing, or its content was changed.
    """
    manifest = manifests.read(path)
    if manifest is None:
        if not has(path, STATE):
            raise CheckpointError(f"{path} has no {STATE}: its save did not end, or it is no checkpoint")
        return
    spared = {name: written for name, written in manifest.files.items() if _is_spared(path, name, manifest.step)}
    needed = {name: written for name, written in manifest.files.items() if name not in spared}
    faults = manifests.hash_faults(path, attrs.evolve(manifest, files=needed))
    if faults and not all(_is_rewritten(path, fault) for fault in faults):
        raise CheckpointError(f"{path} is damaged: {'; '.join(faults)}")
    if faults:
        warnings.warn(
            f"{path}: the weights are not those that were saved ({'; '.join(faults)}); another tool has written them "
            "anew, and they are read as they are",
            stacklevel=2,
        )
    for fault in manifests.hash_faults(path, attrs.evolve(manifest, files=spared)):
        logger.warning("%s was changed since it was saved, and is read as it is: %s", path, fault)


def _is_spared(path: Path, name: str, step: int) -> bool:
    """Tell whether training can go on without a file as it was saved.

    Such are those that are never read; those whose state begins anew where they are gone; and the trainer's own state
    where it was edited, and is still one of the same step.
    """
    if name in (OPTIMIZER, SCHEDULER, RNG, SCALER):
        return not has(path, name)
    if name != STATE:
        return name in _NEVER_READ
    try:
        return TrainerState.load_from_json(str(path / name)).global_step == step
    except (OSError, CheckpointError, *UNREADABLE):
        return False


def _is_rewritten(path: Path, fault: str) -> bool:
    """Tell whether a fault is what splitting, or joining, the weights leaves: files gone, and others whole instead."""
    gone = fault.endswith(" is missing") and fault.startswith(("model", "adapter_model"))
    if not gone and not fault.startswith(f"{INDEX}:") and not fault.startswith(f"{INDEX} has"):
        return False
    if has(path, INDEX):
        names = set(files_of(path / INDEX))
    else:
        names = {WEIGHTS, ADAPTER} & {entry.name for entry in path.iterdir()}
    return bool(names) and not any(header.fault(path / name) for name in names)
