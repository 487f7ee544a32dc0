"""Which processes a launcher started, as Accelerate and torch.distributed know them."""

import logging
import os
import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from forgather_fn.distributed.launched import check_world_size, idle_devices, number_in
from forgather_fn.distributed.rest import rest_at_exit
from forgather_fn.distributed.watch import watching
from forgather_fn.world import ALONE, World

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_known: "weakref.WeakKeyDictionary[Any, World]" = weakref.WeakKeyDictionary()
"""The world of each process group: there is one for all programs of a process."""


def world_of(accelerator: "Accelerator") -> World:
    """Find the processes that an accelerator was launched with; collective, the first time.

    Raises:
        ValueError: A launcher started several, and the accelerator knows of others.
    """
    check_world_size(os.environ, accelerator.num_processes)
    notice = idle_devices(os.environ, torch.accelerator.device_count(), sys.argv)
    if notice is not None and accelerator.device.type != "cpu":
        logger.warning(notice)
    return joined(accelerator.local_process_index)


def launched_on(device: torch.device) -> World:
    """Find the processes that a launcher started; their group is opened if nobody has. Collective, the first time.

    Raises:
        ValueError: What the environment says of them is no number.
    """
    from torch import distributed

    local_rank = number_in(os.environ, "LOCAL_RANK", 0)
    if number_in(os.environ, "WORLD_SIZE", 1, least=1) > 1 and not distributed.is_initialized():
        number_in(os.environ, "RANK", 0)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return joined(local_rank)


def check_same_plan(what: str, world: World, mine: Mapping[str, str]) -> None:
    """Make sure that all processes were given the same; collective.

    Args:
        what: The strategy, for the message.
        world: The processes.
        mine: What must be the same, described part by part, as by :meth:`~forgather_fn.plan.Plan.describe`.

    Raises:
        ValueError: A part is another one on another process; both are shown.
    """
    for rank, other in enumerate(world.gather(dict(mine))):
        for name, text in mine.items():
            if other[name] != text:
                raise ValueError(
                    f"{what}: the processes have other plans; {name}:\n  rank {world.rank}: {text}\n"
                    f"  rank {rank}: {other[name]}"
                )


def joined(local_rank: int) -> World:
    """Give the world of torch's process group, watched over; a process without one is alone. Collective, once."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    group = distributed.group.WORLD
    if group not in _known:
        rest_at_exit()
        control = group if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        votes = distributed.new_group(backend="gloo")  # else a vote would be taken for an answer to one who asks alone
        world = World(distributed.get_rank(), distributed.get_world_size(), local_rank, group, control, votes)
        _known[group] = attrs.evolve(world, watch=watching(world))
    return _known[group]
