"""Floating-point operations: what a model needs of them, and how many a device can do."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


def flops_per_token(parameters: int, *, layers: int = 0, heads: int = 0, head_size: int = 0, context: int = 0) -> int:
    """Count the floating-point operations that training a transformer takes for one token: ``6N + 12LHQT``.

    Two for each parameter forward and four backward; and the products of queries, keys and values. Recomputed
    activations do not count, since they are not the model's (appendix B of "PaLM: Scaling Language Modeling with
    Pathways", Chowdhery and others, 2022, https://arxiv.org/abs/2204.02311).

    Args:
        parameters: ``N``, those that are multiplied with: without tables that are only looked up in.
        layers: ``L``, that have attention.
        heads: ``H``, of queries.
        head_size: ``Q``, the size of one.
        context: ``T``, the length of a sequence, in tokens.

    Raises:
        ValueError: A count is negative; or some of the four of attention are given, and not all.

    Example:
        >>> flops_per_token(124_000_000, layers=12, heads=12, head_size=64, context=1024)
        857246208
    """
    attention = {"layers": layers, "heads": heads, "head_size": head_size, "context": context}
    given = (parameters, *attention.values())
    if any(type(count) is not int or not 0 <= count < 2**63 for count in given) or not parameters:
        raise ValueError(
            f"flops_per_token: counts are integers, and cannot be negative; got parameters={parameters!r}, {attention}"
        )
    missing = [name for name, value in attention.items() if not value]
    if 0 < len(missing) < len(attention):
        raise ValueError(f"flops_per_token: attention needs all four of its sizes; missing: {', '.join(missing)}")
    return 6 * parameters + 12 * math.prod(attention.values())


PEAKS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "A10G": 70e12,
        "A100": 312e12,
        "A40": 149.7e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "H200": 989e12,
        "L4": 121e12,
        "L40S": 362e12,
        "V100": 125e12,
        "Tesla T4": 65e12,
    }
)
"""Dense bfloat16 operations per second (float16 for V100 and T4, which have no bfloat16) by what the name of a device
contains, the longest that fits; from NVIDIA's data sheets, whose figures for sparse matrices are halved."""


def peak_flops(device: str) -> float:
    """Give the floating-point operations per second that a device can do, by its name.

    Args:
        device: As ``torch.cuda.get_device_name()`` gives it, such as ``"NVIDIA H100 80GB HBM3"``.

    Raises:
        ValueError: It is not known.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB") / 1e12
        312.0
    """
    if not isinstance(device, str):
        raise ValueError(
            f"peak_flops: expected a device's name, as torch.cuda.get_device_name() gives it; got {device!r}"
        )
    words = f" {device.replace('-', ' ').lower()} "
    fitting = [name for name in PEAKS if f" {name.lower()} " in words]
    if not fitting:
        raise ValueError(
            f"the peak of {device!r} is not known; give it in floating-point operations per second, as its data sheet "
            f"has it for dense matrices in the precision of the training. Known are {', '.join(PEAKS)}"
        )
    return PEAKS[max(fitting, key=len)]
