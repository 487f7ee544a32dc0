"""Seeding everything that draws random numbers."""

import os
import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python's, numpy's and torch's generators, those of accelerators included.

    Args:
        seed: From 0 to 2**32 - 1, as numpy takes it.
        deterministic: Also refuse operations that give other results at each run.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def enable_full_determinism(seed: int, warn_only: bool = False) -> None:
    """Seed everything, and let torch and its libraries use deterministic kernels only, which are slower.

    Args:
        seed: As for :func:`set_seed`.
        warn_only: Warn of operations that have no such kernel, instead of refusing them.
    """
    set_seed(seed)
    os.environ.update(
        CUDA_LAUNCH_BLOCKING="1",
        CUBLAS_WORKSPACE_CONFIG=":16:8",
        ASCEND_LAUNCH_BLOCKING="1",
        HCCL_DETERMINISTIC="1",
        FLASH_ATTENTION_DETERMINISTIC="1",
    )
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def seed_worker(worker_id: int) -> None:
    """Seed the global generators of a data worker by what torch has seeded its own with."""
    del worker_id
    set_seed(torch.initial_seed() % 2**32)
