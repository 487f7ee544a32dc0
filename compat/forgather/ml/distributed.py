"""Which process of a run this is, and where it computes."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from forgather_fn.distributed.rest import rest_at_exit


@dataclass
class StaticDistributedEnvironment:
    """A place among processes, as it is told.

    Attributes:
        rank: Which of all processes this is.
        local_rank: Which of its machine's processes it is.
        world_size: How many processes there are.
        local_world_size: How many there are on its machine.
        master_addr: Where the first process is found.
        master_port: At which port.
        device: Where this process computes.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = "localhost"
    master_port: int = 29501
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A rank is not below its number of processes.
        """
        for rank, size in (("rank", "world_size"), ("local_rank", "local_world_size")):
            if not 0 <= getattr(self, rank) < getattr(self, size):
                raise ValueError(
                    f"{rank}={getattr(self, rank)} of {size}={getattr(self, size)}: a rank is at least 0 and below the "
                    "number of processes"
                )

    @property
    def device_type(self) -> str:
        """The kind of the device: ``cpu``, ``cuda``."""
        return torch.device(self.device).type

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first of all processes."""
        return self.rank == 0


_VARIABLES: Mapping[str, str] = {
    "rank": "RANK",
    "local_rank": "LOCAL_RANK",
    "world_size": "WORLD_SIZE",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
}


def from_launcher(device: str | torch.device | None = None) -> dict[str, Any]:
    """Read what a launcher such as torchrun says in the environment; one process where there was none.

    Args:
        device: None finds it: the accelerator of the local rank, or the CPU.

    Returns:
        The attributes of a :class:`StaticDistributedEnvironment`.

    Raises:
        ValueError: A variable that should be a number is none.
    """
    found: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        value = os.environ.get(variable)
        if value is None:
            continue
        if name != "master_addr" and not re.fullmatch(r"[0-9]{1,9}", value):
            raise ValueError(
                f"the environment's {variable}={value[:40]!r} is no number; launchers such as torchrun set it"
            )
        found[name] = value if name == "master_addr" else int(value)
    # Some launchers say how many processes there are in all, and not how many of them are here.
    found.setdefault("local_world_size", max(found.get("local_rank", 0) + 1, 1))
    if device is None:
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device("cpu") if kind is None else torch.device(kind.type, found.get("local_rank", 0))
    return found | {"device": torch.device(device)}


@dataclass(init=False)
class DistributedEnvironment(StaticDistributedEnvironment):
    """The place that a launcher gave this process, with the group of processes opened.

    A group is opened where there are several processes, and closed by :meth:`close` or at the end of a ``with`` block.
    One that is open already is used, and left open.

    Args:
        backend: Of torch.distributed; None for ``nccl`` on CUDA and ``gloo`` elsewhere.
        device: Where this process computes; None finds it.
        always: Open a group for a single process too.
        timeout: Seconds that processes wait for each other.

    Example:
        >>> DistributedEnvironment(device="cpu").world_size
        1
    """

    backend: str = field(default="gloo", init=False)

    def __init__(
        self,
        backend: str | None = None,
        device: str | torch.device | None = None,
        always: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(**from_launcher(device))
        self.backend = backend or ("nccl" if self.device_type == "cuda" else "gloo")
        self._opened = False
        if self.device_type not in ("cpu", "mps"):
            torch.accelerator.set_device_index(torch.device(self.device).index or 0)
        if self.world_size > 1 or always:
            self._open(timeout)

    def _open(self, timeout: float) -> None:
        from torch import distributed

        if distributed.is_initialized():
            return
        if self.world_size == 1 and "MASTER_ADDR" not in os.environ:
            # Nobody is to be found, so no port is opened.
            where: dict[str, Any] = {"store": distributed.HashStore()}  # type: ignore[attr-defined]  # it is there
        else:
            os.environ.setdefault("MASTER_ADDR", self.master_addr)
            os.environ.setdefault("MASTER_PORT", str(self.master_port))
            where = {"init_method": "env://"}
        distributed.init_process_group(
            self.backend,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout),
            **where,
        )
        rest_at_exit()
        self._opened = True

    def close(self) -> None:
        """Close the group, if it was opened here."""
        from torch import distributed

        if self._opened and distributed.is_initialized():
            distributed.destroy_process_group()
        self._opened = False

    def __enter__(self) -> "DistributedEnvironment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
