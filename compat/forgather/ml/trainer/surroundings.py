"""Settings of the process that hold while a trainer runs, and are put back afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def surroundings(args: Any) -> Iterator[None]:
    """Set what arguments ask of the process, for the time of a block."""
    with contextlib.ExitStack() as stack:
        precision = getattr(args, "float32_matmul_precision", None)
        if getattr(args, "tf32", None) is not None and precision is None:
            precision = "high" if args.tf32 else "highest"
        if precision is not None:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(precision)
        if getattr(args, "detect_anomaly", False):
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
        backends = getattr(args, "sdpa_backend", None)
        if backends:
            stack.enter_context(_attention(backends, getattr(args, "sdpa_set_priority", False)))
        if getattr(args, "enable_activation_offloading", False):
            stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=torch.accelerator.is_available()))
        if getattr(args, "full_determinism", False):
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
        limit = getattr(args, "dynamo_recompile_limit", None)
        if limit is not None:
            import torch._dynamo.config as dynamo

            stack.callback(setattr, dynamo, "recompile_limit", dynamo.recompile_limit)
            dynamo.recompile_limit = limit
        yield


def _attention(backends: Any, in_order: bool) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    names = [backends] if isinstance(backends, str) else list(backends)
    return sdpa_kernel([kinds[name] for name in names], set_priority=in_order)
