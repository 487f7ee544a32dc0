"""Settings of the process that hold while a trainer runs, and are put back afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from forgather_fn.tree import walk


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


@contextlib.contextmanager
def finite_outputs(model: nn.Module, debug: Any) -> Iterator[None]:
    """Stop at the first module that gives a value that is not finite, where ``debug`` asks for that.

    Raises:
        ValueError: In the forward pass: the module, what went in, and what came out.
    """
    if "underflow_overflow" not in [getattr(option, "value", option) for option in debug]:
        yield
        return
    names = {child: name or type(model).__name__ for name, child in model.named_modules()}

    def look(child: nn.Module, inputs: Any, outputs: Any) -> None:
        found = [t for _, t in walk(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not all(bool(torch.isfinite(t).all()) for t in found):
            given = [t for _, t in walk(inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            raise ValueError(
                f"inf/nan detected in the output of {names[child]} ({type(child).__name__}): inputs up to "
                f"{_largest(given)}, weights up to {_largest(list(child.parameters(recurse=False)))}"
            )

    hooks = [child.register_forward_hook(look) for child in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _largest(tensors: list[torch.Tensor]) -> str:
    return f"{max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0):.3g}"


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
