"""The state file of a checkpoint, ``state.json``: read, and held against the form in which a snapshot writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from forgather_fn.checkpoint.foreign import read_json
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.snapshot import STATE, VERSION
from forgather_fn.state import COUNTERS

DEEPEST: Final = 100
"""How deep a tree of a state may be."""
_WORD: Final = range(-(2**63), 2**63)


def read(path: Path) -> Mapping[str, Any]:
    """Read the state file of a checkpoint.

    Args:
        path: The directory of the checkpoint.

    Raises:
        CheckpointError: It is no JSON, too large, of a newer version, or lacks a field, or one is not what it should
            be.
        OSError: It cannot be read.
    """
    record = read_json(path / STATE)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: {STATE} is no JSON object")
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path}: {STATE} is of version {version}; this library reads up to {VERSION}")
    for name, (is_right, expected) in _FIELDS.items():
        if name not in record:
            raise CheckpointError(f"{path}: {STATE} lacks {name!r}")
        if not is_right(record[name]):
            raise CheckpointError(f"{path}: {STATE}: {name!r} is no {expected}: {_short(record[name])}")
    return record


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_integer(value: Any) -> bool:
    return type(value) is int and value in _WORD


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _holds(*names: str, each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Tell a mapping that has these names at least, and whose values are right."""
    return lambda value: isinstance(value, dict) and value.keys() >= set(names) and all(map(each, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_tree(value: Any, depth: int = 0) -> bool:
    """Tell what :func:`~forgather_fn.checkpoint.record.encode` gives."""
    if depth > DEEPEST or not isinstance(value, dict):
        return False
    match value:
        case {"tensor": str(), "host": bool()} | {"flat": str()}:
            return True
        case {"mapping": dict(children)}:
            return all(_is_tree(child, depth + 1) for child in children.values())
        case {"sequence": list(children), "kind": "tuple" | "list"}:
            return all(_is_tree(child, depth + 1) for child in children)
        case {"value": str(text), "kind": "float"}:
            return _is_number(text)
        case {"value": None | bool() | int() | str(), "kind": str()}:
            return True
    return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_FIELDS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "version": (lambda value: _is_integer(value) and value >= 1, "version"),
    "step": (_is_count, "number of batches"),
    "samples": (_is_count, "number of samples"),
    "seed": (lambda value: type(value) is int, "seed"),
    "data": (_or_none(_is_text), "fingerprint of a stream, or null"),
    "batch_size": (
        lambda value: value is None or _is_text(value) or _is_count(value),
        "number of samples, or null, or text of a schedule",
    ),
    "counters": (_holds(*COUNTERS, each=_is_integer), f"mapping with numbers for {', '.join(COUNTERS)}"),
    "structure": (_holds("opt", "transforms", "controls", each=_is_tree), "description of trees of tensors"),
    "buffers": (_is_names, "list of names"),
    "ema": (lambda value: isinstance(value, bool), "true or false"),
    "plan": (_holds(each=_is_text), "mapping of texts"),
}
"""What every state file has: how to tell it, and what it is called."""
