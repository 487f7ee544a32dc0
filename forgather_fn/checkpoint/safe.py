"""Writing safetensors files in a stream: header first, then each tensor, hashed on the way to the disk.

The library writes such a file without saying when it is on the disk and without a hash, and from a copy in memory; it
is used to read. The format is 8 bytes of header length, the header in JSON, and the tensors without gaps; source:
https://huggingface.co/docs/safetensors.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from forgather_fn.checkpoint import system
from forgather_fn.checkpoint.hashing import Hash, Written

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}

HEADER_LIMIT = 100_000_000
"""Bytes that a header may have, as in the library."""


def write_file(path: Path, parts: Iterator[memoryview]) -> Written:
    """Write a new file part by part, hashed, and wait until it is on the disk."""
    hashed = Hash()
    file = system.create(path)
    try:
        for part in parts:
            for start in range(0, len(part), system.CHUNK):
                chunk = part[start : start + system.CHUNK]
                system.write_all(file, chunk)
                hashed.update(chunk)
        system.sync(file)
    finally:
        system.close(file)
    return hashed.written()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write named tensors, on the CPU, as a safetensors file.

    Args:
        path: A file that does not exist.
        tensors: By name; any strides.

    Raises:
        ValueError: A tensor has a data type that the format does not know.
    """
    return write_file(path, _parts(tensors))


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    # Larger items first, as the library does, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: safetensors has no data type {tensor.dtype}; convert it to one of {list(DTYPES)}"
            )
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        yield _bytes(tensors[name])


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def fault(path: Path) -> str | None:
    """Say what is wrong with a safetensors file as far as its header and size tell; None if nothing is."""
    try:
        with system.read_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, HEADER_LIMIT):
                return f"{path.name} is cut short or has no header"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return f"{path.name} has no header that can be read: {type(error).__name__}"
