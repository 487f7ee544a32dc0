"""Trees of tensors: nested mappings and sequences, walked by path."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forgather_fn.flat import Flat


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give every leaf of a tree with its path, in order.

    Example:
        >>> list(walk({"a": (1, {"b": 2}), "c": None}))
        [('a/0', 1), ('a/1/b', 2), ('c', None)]
    """
    if isinstance(tree, Mapping):
        pairs: Any = tree.items()
    elif isinstance(tree, tuple | list):
        pairs = enumerate(tree)
    else:
        yield path, tree
        return
    for name, child in pairs:
        yield from walk(child, f"{path}/{name}" if path else str(name))


def tensors(tree: Any) -> list[Tensor]:
    """Give the tensors of a tree in order, and of flat storage its buffers.

    Example:
        >>> [t.item() for t in tensors({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
        [1, 2]
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Flat):
        return list(tree.buffers)
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for child in children for tensor in tensors(child)]


def filled(tree: Any, new: Sequence[Tensor]) -> Any:
    """Put other tensors in the places of those that :func:`tensors` gives.

    Example:
        >>> filled({"a": torch.tensor(1), "b": "text"}, [torch.tensor(3)])
        {'a': tensor(3), 'b': 'text'}
    """
    return _filled(tree, iter(new))


def _filled(tree: Any, new: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(new)
    if isinstance(tree, Flat):
        return Flat(tree.layout, tuple(next(new) for _ in tree.buffers))
    if isinstance(tree, Mapping):
        return {name: _filled(child, new) for name, child in tree.items()}
    if isinstance(tree, tuple | list):
        return rebuilt(tree, [_filled(child, new) for child in tree])
    return tree


def copied(tree: Any) -> Any:
    """Copy a tree with storage of its own for every tensor; flat storage stays flat."""
    if isinstance(tree, Flat):
        return tree.copy()
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {name: copied(child) for name, child in tree.items()}
    if isinstance(tree, tuple | list):
        return rebuilt(tree, [copied(child) for child in tree])
    return copy.copy(tree)


def rebuilt(like: Any, items: Sequence[Any]) -> Any:
    """Make a sequence of the kind of another, named tuples too."""
    return type(like)(*items) if isinstance(like, tuple) and type(like) is not tuple else type(like)(items)


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Name the first leaf in which two trees differ, to the bit; None if they do not.

    Example:
        >>> difference({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 3.0])})
        'w: 1 of 2 elements differ, by at most 1; the first at [1]: 2.0 and 3.0'
    """
    ones, others = dict(walk(one, path)), dict(walk(other, path))
    for name in [*ones, *(name for name in others if name not in ones)]:
        if name not in ones or name not in others:
            return f"{name}: only in the {'first' if name in ones else 'second'}"
        found = _leaf_difference(ones[name], others[name])
        if found:
            return f"{name}: {found}"
    return None


def _leaf_difference(one: Any, other: Any) -> str | None:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        same = type(one) is type(other) and (one == other or (one != one and other != other))
        return None if same else f"{one!r} and {other!r}"
    kinds = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (one, other)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} and {kinds[1]}"
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    width = one.element_size()
    unlike = (_bytes(one) != _bytes(other)).reshape(-1, width).any(dim=1)
    count = int(unlike.sum())
    if not count:
        return None
    first = int(unlike.nonzero()[0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), one.shape)] if one.dim() else []
    values = one.reshape(-1)[first].item(), other.reshape(-1)[first].item()
    gap = (one.double() - other.double()).abs().max() if not one.is_complex() else (one - other).abs().max()
    return (
        f"{count} of {one.numel()} elements differ, by at most {gap.item():.3g}; "
        f"the first at {place}: {values[0]} and {values[1]}"
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def size(tree: Any) -> tuple[int, int, int]:
    """Count a tree's tensors, their elements, and their bytes."""
    tensors = [leaf for _, leaf in walk(tree) if isinstance(leaf, Tensor)]
    return len(tensors), sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def gated(found_inf: Tensor, old: Any, new: Any) -> Any:
    """Take a tree of new leaves, or the old ones where the flag on the device is 1.

    Tensors are chosen where they are. What else changes, a number, a tensor of another shape, a part of another form,
    is chosen on the host, which waits for the flag.
    """
    if isinstance(new, Tensor) and isinstance(old, Tensor) and old.shape == new.shape:
        return torch.where(found_inf > 0, old, new)
    if isinstance(new, Mapping) and isinstance(old, Mapping) and old.keys() == new.keys():
        return {name: gated(found_inf, old[name], child) for name, child in new.items()}
    if isinstance(new, tuple | list) and isinstance(old, tuple | list) and len(old) == len(new):
        return rebuilt(new, [gated(found_inf, mine, child) for mine, child in zip(old, new, strict=True)])
    return new if new is old or not found_inf.item() else old
