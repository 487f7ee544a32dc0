"""Checkpoints: the serialised middle of a fold, that survives a kill at any instant and resumes to the bit."""

from forgather_fn.checkpoint.catalog import Entry as Entry
from forgather_fn.checkpoint.catalog import latest as latest
from forgather_fn.checkpoint.catalog import list_checkpoints as list_checkpoints
from forgather_fn.checkpoint.catalog import verify as verify
from forgather_fn.checkpoint.loading import load as load
from forgather_fn.checkpoint.lock import RunLockedError as RunLockedError
from forgather_fn.checkpoint.manifest import CheckpointError as CheckpointError
from forgather_fn.checkpoint.replaying import Replay as Replay
from forgather_fn.checkpoint.replaying import replay as replay
from forgather_fn.checkpoint.restoring import load_weights as load_weights
from forgather_fn.checkpoint.rotation import Best as Best
from forgather_fn.checkpoint.rotation import Policy as Policy
from forgather_fn.checkpoint.rotation import superseded as superseded
from forgather_fn.checkpoint.saving import SaveError as SaveError
from forgather_fn.checkpoint.saving import save as save
from forgather_fn.checkpoint.saving import saved as saved
