"""Checkpoints: the serialised middle of a fold, that survives a kill at any instant and resumes to the bit."""

from typing import TYPE_CHECKING

from forgather_fn.deferred import deferred_names

if TYPE_CHECKING:
    from forgather_fn.checkpoint.catalog import Entry, latest, list_checkpoints, verify
    from forgather_fn.checkpoint.loading import load
    from forgather_fn.checkpoint.lock import RunLockedError
    from forgather_fn.checkpoint.manifest import CheckpointError
    from forgather_fn.checkpoint.replaying import Replay, replay
    from forgather_fn.checkpoint.restoring import load_weights
    from forgather_fn.checkpoint.rotation import Best, Policy, superseded
    from forgather_fn.checkpoint.saving import SaveError, save, saved

__all__ = [
    "Best",
    "CheckpointError",
    "Entry",
    "Policy",
    "Replay",
    "RunLockedError",
    "SaveError",
    "latest",
    "list_checkpoints",
    "load",
    "load_weights",
    "replay",
    "save",
    "saved",
    "superseded",
    "verify",
]

if not TYPE_CHECKING:  # for whom a module with a __getattr__ has any name
    __getattr__, __dir__ = deferred_names(
        __name__,
        {
            "catalog": "Entry latest list_checkpoints verify",
            "loading": "load",
            "lock": "RunLockedError",
            "manifest": "CheckpointError",
            "replaying": "Replay replay",
            "restoring": "load_weights",
            "rotation": "Best Policy superseded",
            "saving": "SaveError save saved",
        },
    )
