"""A snapshot: what of a state goes into a checkpoint, in memory that no step will change."""

import json
import platform
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import numpy as np
import torch
from torch import Tensor

from forgather_fn.checkpoint.record import encode
from forgather_fn.data import Stream
from forgather_fn.flat import Flat
from forgather_fn.program import Program
from forgather_fn.state import COUNTERS, TrainState

VERSION: Final = 1
STATE: Final = "state.json"
SHARD_BYTES: Final = 5 * 10**9
"""Above this size the weights are split into several files."""


@attrs.frozen(eq=False)
class Snapshot:
    """The content of a checkpoint, ready to be written.

    Attributes:
        step: Batches consumed.
        samples: Samples consumed.
        tensors: For each safetensors file, what it holds.
        texts: For each other file, its bytes.
        metrics: Results known at this step.
    """

    step: int
    samples: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, bytes]
    metrics: Mapping[str, float]

    def size(self) -> int:
        """Count the bytes that it takes on the disk, headers roughly."""
        held = (t.numel() * t.element_size() + 256 for group in self.tensors.values() for t in group.values())
        return sum(held) + sum(map(len, self.texts.values())) + (1 << 16)


@attrs.define(eq=False)
class Memory:
    """Host memory that snapshots of one state after another are copied into."""

    kept: dict[str, Tensor] = attrs.field(factory=dict)

    def like(self, path: str, tensor: Tensor) -> Tensor:
        """Give memory for a tensor; pinned where an accelerator copies into it."""
        found = self.kept.get(path)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.kept[path] = found
        return found


def snapshot(
    state: TrainState, program: Program, data: Any, metrics: Mapping[str, float], memory: Memory | None
) -> tuple[Snapshot, Callable[[], None]]:
    """Describe a state, and say what is still to be copied.

    Module buffers and counters, which a forward pass may change, are copied at once; parameters, slots and averages,
    which only an update changes, by the function returned. Frozen parameters are not copied. Without memory to copy to,
    nothing is copied later: the state is on the host, and no step will ever change it.

    Returns:
        The snapshot, whose tensors have their values when the function has been called; and the function.

    Raises:
        ValueError: Something in the state is not what a checkpoint can hold.
    """
    arrays = state.read()
    copies: list[tuple[Tensor, Tensor]] = []

    paths: set[str] = set()

    def later(path: str, tensor: Tensor) -> Tensor:
        if path in paths:
            raise ValueError(f"{path}: two tensors of the state have this name; rename one")
        paths.add(path)
        if memory is None:
            return tensor.detach()
        host = memory.like(path, tensor)
        copies.append((host, tensor.detach()))
        return host

    def flat_later(path: str, flat: Flat) -> Flat:
        return Flat(flat.layout, tuple(later(f"{path}/{i}", buffer) for i, buffer in enumerate(flat.buffers)))

    def keeping(tensors: dict[str, Tensor]) -> Callable[[str, Tensor | Flat], None]:
        def keep(path: str, leaf: Tensor | Flat) -> None:
            if isinstance(leaf, Flat):
                tensors.update({f"{path}/{name}": view for name, view in flat_later(path, leaf).items()})
            else:
                tensors[path] = later(path, leaf)

        return keep

    persistent = _persistent_buffers(program.module())
    buffers = {name: tensor.to("cpu", copy=True) for name, tensor in arrays.buffers.items()}
    model = {**flat_later("params", arrays.params), **{name: t.to("cpu") for name, t in arrays.frozen.items()}}
    model |= {name: tensor for name, tensor in buffers.items() if name in persistent}
    optimizer: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    structure = {
        "opt": encode(arrays.opt, "opt", keeping(optimizer)),
        "transforms": encode(arrays.transforms, "transforms", keeping(others)),
        "controls": encode(arrays.controls, "controls", keeping(others)),
        "loss_scale": encode(arrays.loss_scale, "loss_scale", keeping(others)),
    }
    tensors: dict[str, Mapping[str, Tensor]] = {
        "optimizer.safetensors": optimizer,
        "buffers.safetensors": {name: tensor for name, tensor in buffers.items() if name not in persistent},
        "other.safetensors": others,
        "ema.safetensors": dict(flat_later("ema", arrays.ema)) if arrays.ema is not None else {},
    }
    texts, weights = _weights(model)
    tensors = {name: held for name, held in (*weights.items(), *tensors.items()) if held}
    texts[STATE] = _index(state, program, data, structure, metrics)
    config = _config(program.module())
    if config is not None:
        texts["config.json"] = config

    def copy() -> None:
        for host, source in copies:
            host.copy_(source)

    return Snapshot(state.step, state.samples, tensors, texts, metrics), copy


def _index(
    state: TrainState, program: Program, data: Any, structure: Mapping[str, Any], metrics: Mapping[str, float]
) -> bytes:
    """Write what a checkpoint says of a state besides its tensors."""
    arrays = state.read()
    return _json(
        {
            "version": VERSION,
            "step": state.step,
            "samples": state.samples,
            "seed": state.seed,
            "data": state.data,
            "batch_size": state.batch_size,
            "cursor": state.cursor,
            "counters": {name: int(getattr(arrays, name)) for name in COUNTERS},
            "structure": structure,
            "buffers": list(arrays.buffers),
            "ema": arrays.ema is not None,
            "plan": program.plan.describe(),
            "stream": repr(data) if isinstance(data, Stream) else type(data).__name__,
            "versions": versions(),
            "world": program.world.size,
            "metrics": {name: repr(float(value)) for name, value in metrics.items()},
        }
    )


def _weights(model: Mapping[str, Tensor]) -> tuple[dict[str, bytes], dict[str, Mapping[str, Tensor]]]:
    """Split the weights into files of at most :data:`SHARD_BYTES`, with Hugging Face's names and index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.items():
        held = tensor.numel() * tensor.element_size()
        if shards[-1] and size + held > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += held
    if len(shards) == 1:
        return {}, {"model.safetensors": shards[0]}
    named: dict[str, Mapping[str, Tensor]] = {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
    }
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.values())
    places = {name: file for file, shard in named.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return {"model.safetensors.index.json": _json(index)}, named


def _persistent_buffers(module: torch.nn.Module) -> frozenset[str]:
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._buffers
        if name not in child._non_persistent_buffers_set
    )


def _config(module: torch.nn.Module) -> bytes | None:
    """Give the configuration of a Hugging Face model, so that its ``from_pretrained`` opens the checkpoint."""
    write = getattr(getattr(module, "config", None), "to_json_string", None)
    return str(write()).encode("utf-8") if callable(write) else None


def versions() -> dict[str, str]:
    """Name the versions that the bits of a run depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _json(record: Any) -> bytes:
    return json.dumps(record, indent=1, allow_nan=False).encode("utf-8")
