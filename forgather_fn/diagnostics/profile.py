"""A profile of a few steps, as a Chrome trace."""

import contextlib
import os
from collections.abc import Iterator

import torch

from forgather_fn.diagnostics.window import during
from forgather_fn.loop import Stage
from forgather_fn.reports.path import made_directory, naming
from forgather_fn.signature import checked


@checked
def profiled(
    directory: str | os.PathLike[str],
    *,
    start: int,
    steps: int = 1,
    memory: bool = False,
    shapes: bool = False,
    stacks: bool = False,
) -> Stage:
    """Profile steps by ``torch.profiler``, and write what it found as a Chrome trace.

    Each process writes ``steps-<first>-<last>.rank-<rank>.pt.trace.json`` when the last of the steps has been made, or
    when the run ends before that, also by an error. Open it at https://ui.perfetto.dev or at chrome://tracing. Each
    step, with the reading of its batch, is a range named ``step <number>``. Other steps are not slowed down. The first
    profile of a process takes about a second to begin, and the first steps of a run are not like the others: start at
    step 10 or so.

    Args:
        directory: Created with its parents.
        start: The first step, by the number that it leads to, as :func:`~forgather_fn.stages.at` counts.
        steps: How many.
        memory: Record allocations.
        shapes: Record the shapes of inputs.
        stacks: Record where calls come from, which slows them down.

    Raises:
        ValueError: A number is less than 1; when the stream is opened: it is known to end before the first step, or the
            directory cannot be used.
    """

    @contextlib.contextmanager
    def recording(device: torch.device, rank: int) -> Iterator[None]:
        path = made_directory(directory) / f"steps-{start}-{start + steps - 1}.rank-{rank}.pt.trace.json"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(
            activities=activities, profile_memory=memory, record_shapes=shapes, with_stack=stacks
        )
        profile.start()
        try:
            yield
        finally:
            profile.stop()
            with naming(path, "a file that can be written"):
                profile.export_chrome_trace(os.fspath(path))

    def named(step: int) -> contextlib.AbstractContextManager[object]:
        return torch.profiler.record_function(f"step {step}")

    return during(f"profiled(start={start})", start, steps, recording, named)
