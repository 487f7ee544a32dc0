"""Which processes a launcher started, as Accelerate or torch.distributed knows them."""

import os
import weakref
from typing import TYPE_CHECKING, Any

from forgather_fn.world import ALONE, World

if TYPE_CHECKING:
    from accelerate import Accelerator

_known: "weakref.WeakKeyDictionary[Any, World]" = weakref.WeakKeyDictionary()
"""The world of each process group: there is one for all programs of a process."""


def world_of(accelerator: "Accelerator") -> World:
    """Find the processes that an accelerator was launched with.

    Raises:
        ValueError: A launcher started several, and the accelerator believes that it is alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"a launcher started {started} processes, and Accelerate knows of {accelerator.num_processes}: each would "
            "train by itself. Without an accelerator, use Accelerator(cpu=True), or ACCELERATE_USE_CPU=true"
        )
    return joined(accelerator.local_process_index)


def joined(local_rank: int) -> World:
    """Give the world of torch's process group; a process without one is alone."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    group = distributed.group.WORLD
    if group not in _known:
        control = group if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        _known[group] = World(distributed.get_rank(), distributed.get_world_size(), local_rank, group, control)
    return _known[group]
