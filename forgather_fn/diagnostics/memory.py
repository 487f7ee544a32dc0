"""A recording of the memory that a few steps allocate on a CUDA device."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

import torch

from forgather_fn.diagnostics.window import during
from forgather_fn.loop import Stage, Steps
from forgather_fn.reports.path import made_directory, naming
from forgather_fn.signature import checked

_NOT_ON: Final = (
    "memory_recorded: torch records allocations of CUDA devices, and this run is on {device!r}; "
    "ff.diagnostics.profiled(directory, start={start}, memory=True) shows them in a trace, on any device"
)


@checked
def memory_recorded(
    directory: str | os.PathLike[str], *, start: int, steps: int = 1, entries: int = 1_000_000
) -> Stage:
    """Record every allocation of some steps, with where it came from, as a snapshot of torch's CUDA allocator.

    Each process writes ``steps-<first>-<last>.rank-<rank>.pickle`` when the last of the steps has been made, or when
    the run ends before that: also when it is out of memory. Open it at https://pytorch.org/memory_viz, which shows what
    is held at any moment (https://docs.pytorch.org/docs/stable/torch_cuda_memory.html).

    Args:
        directory: Created with its parents.
        start: The first step, by the number that it leads to, as :func:`~forgather_fn.stages.at` counts.
        steps: How many.
        entries: As many allocations and frees as are kept, the last ones.

    Raises:
        ValueError: A number is less than 1; when the first of the steps begins: the run is not on a CUDA device, or the
            directory cannot be used.
    """
    if entries < 1:
        raise ValueError(f"memory_recorded: entries must be at least 1, got {entries}")

    @contextlib.contextmanager
    def recording(device: torch.device, rank: int) -> Iterator[None]:
        path = made_directory(directory) / f"steps-{start}-{start + steps - 1}.rank-{rank}.pickle"
        torch.cuda.memory._record_memory_history(max_entries=entries, device=device, clear_history=True)
        try:
            yield
        finally:
            with naming(path, "a file that can be written"):
                torch.cuda.memory._dump_snapshot(os.fspath(path))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)

    watched = during(f"memory_recorded(start={start})", start, steps, recording, lambda step: contextlib.nullcontext())

    def stage(upstream: Steps) -> Steps:
        device = upstream.state.updates.device
        if device.type != "cuda":
            raise ValueError(_NOT_ON.format(device=str(device), start=start))
        return watched(upstream)

    return stage
