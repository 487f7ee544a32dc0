"""What a step, an evaluation and a stream must not depend on, and must not change."""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from forgather_fn.data.loading import Generators

_OTHER_SEED: Final = 20_011
_DAY: Final = 86_400


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Run a block as if in another process: other global random states, another rank, another day."""
    before = Generators.read()
    clocks: dict[str, Any] = {
        "time": partial(_shifted, time.time, _DAY),
        "time_ns": partial(_shifted, time.time_ns, _DAY * 10**9),
    }
    random.seed(_OTHER_SEED)
    np.random.seed(_OTHER_SEED)
    torch.default_generator.manual_seed(_OTHER_SEED)
    devices = _accelerators()
    if devices:
        torch.cuda.manual_seed_all(_OTHER_SEED)
    rank = {"RANK": str(int(os.environ.get("RANK", "0")) + 1)}
    try:
        with mock.patch.dict(os.environ, rank), mock.patch.multiple(time, **clocks):
            yield
    finally:
        before.restore()
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _accelerators() -> list[Tensor]:
    """Copy the states of the generators of CUDA devices, if they are in use."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use else []


def _shifted(clock: Callable[[], float], units: float) -> float:
    return clock() + units


@contextlib.contextmanager
def drawing_nothing(what: str) -> Iterator[None]:
    """Make sure that a block leaves the global random generators as they were.

    Args:
        what: Names the block in the message.

    Raises:
        AssertionError: One of them was advanced.
    """
    before, devices = Generators.read(), _accelerators()
    yield
    names = before.advanced()
    if devices and not all(map(torch.equal, devices, _accelerators())):
        names.append("torch's CUDA generator")
    if names:
        before.restore()
        raise AssertionError(
            f"{what} left a global random generator in another state ({', '.join(names)}). Random numbers in a step "
            "come from torch's default generator, which is seeded for it and put back after it; draw them there."
        )
