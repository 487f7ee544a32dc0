"""Weights on the disk: written for other tools, and read whatever tool wrote them."""

import importlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgather_fn.checkpoint.foreign import files_of
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.reading import UNREADABLE

logger = logging.getLogger(__name__)

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
OLD_WEIGHTS, OLD_INDEX, OLD_ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether a model saves itself: one of transformers or PEFT; others may mean another thing by the method."""
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    return bool(kinds & {("transformers", "PreTrainedModel"), ("peft", "PeftModel")})


def write_weights(model: nn.Module, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the weights of a plain module as ``model.safetensors``; tied ones once, under their first name."""
    import safetensors.torch

    state = model.state_dict() if state_dict is None else state_dict
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{type(model).__name__}.state_dict() has {name!r}, a {type(tensor).__name__}, which safetensors "
                "cannot hold. Override save_model to write it, or keep it out of the state_dict."
            )
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if place not in seen:
            seen[place] = name
            tensors[name] = tensor.detach().contiguous()
    path = folder / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def read_weights(model: nn.Module, folder: str) -> None:
    """Read weights into a module, in place, whatever their files.

    Raises:
        ValueError: The directory has none, or they cannot be read.
    """
    if hasattr(model, "load_adapter") and hasattr(model, "active_adapters") and has_adapters(folder):
        _read_adapters(model, folder)
        return
    state: dict[str, Tensor] = {}
    if has(folder, INDEX):
        for name in files_of(Path(folder, INDEX)):
            state.update(_read_safe(os.path.join(folder, name)))
    elif has(folder, WEIGHTS):
        state = _read_safe(os.path.join(folder, WEIGHTS))
    elif has(folder, OLD_INDEX):
        for name in files_of(Path(folder, OLD_INDEX)):
            state.update(_tensors(os.path.join(folder, name)))
    elif has(folder, OLD_WEIGHTS):
        state = _tensors(os.path.join(folder, OLD_WEIGHTS))
    else:
        raise ValueError(f"Can't find a valid checkpoint at {folder}")
    result = model.load_state_dict(state, strict=False)
    _tell(model, result, state)


def _read_safe(path: str) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def unpickled(path: str, device: torch.device | str = "cpu") -> Any:
    """Read what torch.save wrote: numbers, tensors, and lists and mappings of them; nothing in it is called.

    Raises:
        CheckpointError: It cannot be read, or has something else in it.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("it is no file")
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, IndexError, pickle.UnpicklingError, *UNREADABLE) as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None


def _tensors(path: str) -> dict[str, Tensor]:
    found = unpickled(path)
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise CheckpointError(f"{path} has no tensors by name, but a {type(found).__name__}")
    return found


def _tell(model: Any, result: Any, state: dict[str, Tensor]) -> None:
    """Report keys that did not match; those of tied weights are no surprise, since each is written once."""
    named = dict(model.state_dict(keep_vars=True))
    loaded = {id(named[name]) for name in state if name in named}
    pointers = {named[name].data_ptr() for name in state if name in named}
    missing = [n for n in result.missing_keys if id(named.get(n)) not in loaded and _pointer(named, n) not in pointers]
    if missing:
        logger.warning("There were missing keys in the checkpoint model loaded: %s.", missing)
    if result.unexpected_keys:
        logger.warning("There were unexpected keys in the checkpoint model loaded: %s.", result.unexpected_keys)


def _pointer(named: dict[str, Any], name: str) -> int | None:
    tensor = named.get(name)
    return tensor.data_ptr() if isinstance(tensor, Tensor) else None


def _read_adapters(model: Any, folder: str) -> None:
    """Read the adapters of a PEFT model; which of them is trained stays as it is."""
    read: Any = importlib.import_module("peft").set_peft_model_state_dict
    active = model.active_adapters[0]
    found = {active: folder} if has(folder, ADAPTER) or has(folder, OLD_ADAPTER) else {}
    if has(folder, ADAPTER) and _subfolders(folder):
        found = {"default": folder}
    found |= {name: os.path.join(folder, name) for name in _subfolders(folder)}
    for name, place in found.items():
        path = os.path.join(place, ADAPTER)
        state = _read_safe(path) if os.path.isfile(path) else _tensors(os.path.join(place, OLD_ADAPTER))
        result = read(model, state, adapter_name=name)
        if result.unexpected_keys:
            logger.warning("There were unexpected keys in the checkpoint model loaded: %s.", result.unexpected_keys)


def has_adapters(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a directory has adapters of PEFT, in itself or in directories of their names."""
    return has(folder, ADAPTER) or has(folder, OLD_ADAPTER) or bool(_subfolders(folder))


def _subfolders(folder: str | os.PathLike[str]) -> list[str]:
    if not os.path.isdir(folder):
        return []
    names = sorted(os.listdir(folder))
    return [n for n in names if has(os.path.join(folder, n), ADAPTER) or has(os.path.join(folder, n), OLD_ADAPTER)]


def has(folder: str | os.PathLike[str], name: str) -> bool:
    """Tell whether a directory has a file."""
    return os.path.isfile(os.path.join(folder, name))
