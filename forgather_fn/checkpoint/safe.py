"""Writing safetensors files in a stream: header first, then each tensor, hashed on the way to the disk.

The library writes such a file without saying when it is on the disk and without a hash, and from a copy in memory; it
is used to read. The format is 8 bytes of header length, the header in JSON, and the tensors without gaps; source:
https://huggingface.co/docs/safetensors.
"""

import json
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
