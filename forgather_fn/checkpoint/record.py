"""Trees as data: a JSON structure that refers to named tensors, and back. No pickle."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.flat import Flat, write
from forgather_fn.tree import rebuilt


def encode(tree: Any, prefix: str, keep: Callable[[str, Tensor | Flat], None]) -> Any:
    """Describe a tree in JSON and hand out its tensors.

    Args:
        tree: Nested mappings with string keys, sequences, tensors, numbers, strings, None.
        prefix: What the tensors' names begin with.
        keep: Takes each tensor, and each flat storage as a whole, with its path.

    Raises:
        ValueError: A leaf is none of these, or a key is not a string.
    """
    if isinstance(tree, Tensor):
        keep(prefix, tree)
        return {"tensor": prefix, "host": tree.device.type == "cpu"}
    if isinstance(tree, Flat):
        keep(prefix, tree)
        return {"flat": prefix}
    if isinstance(tree, Mapping):
        _check_keys(tree, prefix)
        return {"mapping": {name: encode(child, f"{prefix}/{name}", keep) for name, child in tree.items()}}
    if isinstance(tree, tuple | list):
        parts = [encode(child, f"{prefix}/{i}", keep) for i, child in enumerate(tree)]
        return {"sequence": parts, "kind": "tuple" if isinstance(tree, tuple) else "list"}
    if isinstance(tree, float):
        return {"value": repr(float(tree)), "kind": "float"}
    if tree is None or isinstance(tree, bool | int | str):
        return {"value": tree, "kind": type(tree).__name__}
    raise ValueError(
        f"{prefix}: a checkpoint holds tensors, numbers, strings, None, and mappings and sequences of them; got "
        f"{type(tree).__name__}"
    )


def _check_keys(tree: Mapping[Any, Any], prefix: str) -> None:
    odd = [name for name in tree if not isinstance(name, str)]
    if odd:
        raise ValueError(f"{prefix}: a checkpoint holds mappings whose keys are strings; got {odd[0]!r}")


def decode(structure: Any, tensors: Mapping[str, Tensor], like: Any, device: torch.device, path: str) -> Any:
    """Build a tree from its description, in the storage of a fresh one where that is flat.

    Args:
        structure: As :func:`encode` gave it.
        tensors: By name.
        like: The tree of a fresh state, which says what is expected where; None if it does not know.
        device: Where tensors go that were not on the host's own.
        path: For messages.

    Raises:
        CheckpointError: Something is missing, or does not fit what is expected.
    """
    try:
        return _decode(structure, tensors, like, device, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its description cannot be read: {type(error).__name__}: {error}") from None


_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "tensor": ((Tensor,), "a tensor"),
    "flat": ((Flat,), "a tensor for each parameter"),
    "mapping": ((Mapping,), "a mapping"),
    "sequence": ((tuple, list), "a sequence"),
}
"""What :func:`encode` calls the nodes of a tree that are no plain values, in the order in which it looks."""


def _check_kind(structure: Any, like: Any, path: str) -> None:
    """Make sure that a node is of the kind that a fresh state has there; plain values may come to be anything."""
    expected = next((kind for kind, (types, _) in _KINDS.items() if isinstance(like, types)), None)
    if expected is None or expected in structure:
        return
    found = next((text for kind, (_, text) in _KINDS.items() if kind in structure), repr(structure.get("value")))
    raise CheckpointError(
        f"{path}: expected {_KINDS[expected][1]}, the checkpoint has {found}: it was saved by another plan"
    )


def _decode(structure: Any, tensors: Mapping[str, Tensor], like: Any, device: torch.device, path: str) -> Any:
    _check_kind(structure, like, path)
    if "tensor" in structure:
        return _tensor(tensors, structure, like, device, path)
    if "flat" in structure:
        if not isinstance(like, Flat):
            raise CheckpointError(f"{path}: the checkpoint has a slot that this optimizer does not keep")
        prefix = structure["flat"] + "/"
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        fill(like, found, path)
        return like
    if "mapping" in structure:
        known = like if isinstance(like, Mapping) else {}
        missing = [name for name in known if name not in structure["mapping"]]
        if missing:
            raise CheckpointError(f"{path}: the checkpoint lacks {missing}")
        children = structure["mapping"].items()
        return {name: _decode(child, tensors, known.get(name), device, f"{path}/{name}") for name, child in children}
    if "sequence" in structure:
        parts = structure["sequence"]
        fits = isinstance(like, tuple | list) and len(like) == len(parts)
        expected = like if fits else [None] * len(parts)
        pairs = enumerate(zip(parts, expected, strict=True))
        items = [_decode(child, tensors, known, device, f"{path}/{i}") for i, (child, known) in pairs]
        if fits:
            return rebuilt(like, items)
        return tuple(items) if structure["kind"] == "tuple" else items
    return float(structure["value"]) if structure["kind"] == "float" else structure["value"]


def _tensor(tensors: Mapping[str, Tensor], structure: Any, like: Any, device: torch.device, path: str) -> Tensor:
    tensor = tensors[structure["tensor"]]
    if isinstance(like, Tensor) and (like.shape, like.dtype) != (tensor.shape, tensor.dtype):
        raise CheckpointError(
            f"{path}: expected {tuple(like.shape)} {like.dtype}, the checkpoint has {tuple(tensor.shape)} "
            f"{tensor.dtype}"
        )
    return tensor.clone() if structure["host"] else tensor.to(device, copy=True)


def fill(flat: Flat, tensors: Mapping[str, Tensor], path: str) -> None:
    """Copy tensors into flat storage; names, shapes and data types must be equal.

    Raises:
        CheckpointError: They are not; both sides are shown.
    """
    for name, view in flat.items():
        found = tensors.get(name)
        if found is not None and (found.shape, found.dtype) != (view.shape, view.dtype):
            raise CheckpointError(
                f"{path}/{name}: expected {tuple(view.shape)} {view.dtype}, the checkpoint has {tuple(found.shape)} "
                f"{found.dtype}"
            )
    try:
        write(flat, tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
