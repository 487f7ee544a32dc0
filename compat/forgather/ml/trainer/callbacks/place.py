"""Where callbacks write."""

import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any


def default_logging_dir(output_dir: str) -> str:
    """Name a directory for the logs of a run that begins now: by time and machine, as transformers does."""
    stamp = datetime.now().strftime("%b%d_%H-%M-%S")
    return os.path.join(output_dir, "runs", f"{stamp}_{socket.gethostname()}")


def logging_dir(args: Any) -> Path:
    """Find where a run's logs go: ``args.logging_dir``, ``TENSORBOARD_LOGGING_DIR``, or a new one in its output."""
    given = getattr(args, "logging_dir", None) or os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(os.path.expanduser(given or default_logging_dir(args.output_dir)))
