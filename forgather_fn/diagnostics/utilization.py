"""How much of what a device can do a training uses."""

import math
import time
from collections.abc import Mapping

import torch

from forgather_fn.diagnostics import flops
from forgather_fn.loop import Clock, Steps, Tick
from forgather_fn.reports.throughput import Count, throughput
from forgather_fn.signature import checked
from forgather_fn.stages import Observer


@checked
def utilization(
    flops_per_token: float,
    *,
    peak_flops: float | None = None,
    tokens_per_sample: float | None = None,
    clock: Clock = time.monotonic,
) -> Observer:
    """Look at the tokens seen, and at the model-FLOPs utilization: what the model needs, by what the devices can do.

    The utilization is the tokens per second since the look before, times the operations of one, divided by the peak of
    all devices (appendix B of PaLM, https://arxiv.org/abs/2204.02311). A look waits for the device.

    Args:
        flops_per_token: As :func:`~forgather_fn.diagnostics.flops.flops_per_token` counts.
        peak_flops: Floating-point operations per second of one device; None to look it up by the name of a CUDA device.
        tokens_per_sample: The length of a sequence, in tokens. None to count by ``state.tokens``, the weights of the
            objective, which leave out tokens without a label.
        clock: Gives seconds.

    Returns:
        For :func:`~forgather_fn.stages.every` and the like; its results are ``tokens_seen`` and, from the second look
        on, ``model_flops_utilization``.

    Raises:
        ValueError: A number is not positive; when the stream is opened: the peak of the device is not known.
    """
    for name, value in {
        "flops_per_token": flops_per_token,
        "peak_flops": peak_flops,
        "tokens_per_sample": tokens_per_sample,
    }.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"utilization: {name} must be a positive number, got {value!r}")
    before: Count | None = None
    found = peak_flops or math.nan

    def opened(steps: Steps) -> None:
        nonlocal found, before
        before = None
        device = steps.state.updates.device
        if peak_flops is None:
            found = flops.peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))

    def observe(tick: Tick) -> Mapping[str, float]:
        nonlocal before
        state = tick.state
        tokens = int(state.tokens) if tokens_per_sample is None else round(state.samples * tokens_per_sample)
        now = Count(clock(), state.samples, tokens)
        rate = throughput(before, now).get("tokens_per_second") if before is not None else None
        before = now
        if rate is None:
            return {"tokens_seen": tokens}
        used = rate * flops_per_token / (found * tick.run.program.world.size)
        return {"tokens_seen": tokens, "model_flops_utilization": used}

    return Observer(observe, open=opened)
