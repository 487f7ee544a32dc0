"""Models that were built on the meta device: given memory where they are trained, and then their first values.

A model that is built under ``torch.device("meta")`` has shapes and no memory, however large it is. What its modules
would have drawn in their constructors they draw here, in their ``reset_parameters``; nothing is drawn on the host and
copied.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from forgather_fn import tree
from forgather_fn.flat import listed
from forgather_fn.model import initialise_by_name

_UNSET_FLOAT: Final = 0xFF
"""The byte that fills floating tensors that have no value yet: it makes nan, of bits that no operation gives."""

_UNSET_INTEGER: Final = 0xA5
"""The byte that fills others."""

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@attrs.frozen(eq=False)
class _Place:
    """One attribute of a module that was given memory."""

    held: dict[str, Any]
    attribute: str
    name: str
    tensor: Tensor
    version: int


def on_meta(module: nn.Module) -> bool:
    """Tell whether a parameter or buffer of a module is on the meta device."""
    return any(tensor.is_meta for _, _, _, tensor in _tensors(module))


def initialise_from_meta(module: nn.Module, seed: int, device: torch.device) -> None:
    """Give a model that was built on the meta device memory on another, and the values of ``init="by_name"``.

    On a CPU these are the values that the model would have got, had it been built there and initialised by name.
    Tensors that are not on the meta device are moved and initialised as well. Ties, strides, ``requires_grad`` and
    attributes of parameters are kept.

    Args:
        module: Changed in place: its parameters are other objects afterwards.
        seed: Of the run.
        device: Where it is to be.

    Raises:
        ValueError: A parameter or buffer got no value, because no ``reset_parameters`` (or ``_init_weights``, in models
            of Hugging Face) writes to it, or a tensor that is neither was left on the meta device. The first are named.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        >>> initialise_from_meta(model, seed=0, device=torch.device("cpu"))
        >>> model[0].weight.device, model[1].running_var
        (device(type='cpu'), tensor([1., 1., 1.]))
    """
    initialise_modules(module, {name for name, _ in module.named_modules()}, seed, device)


def initialise_modules(module: nn.Module, names: Collection[str], seed: int, device: torch.device) -> None:
    """Do what :func:`initialise_from_meta` does for some of the modules in a model: for what they have themselves.

    Args:
        module: The whole model; changed in place.
        names: Of these modules, as ``named_modules`` has them; ``""`` is the model itself.
        seed: Of the run.
        device: Where they are to be.

    Raises:
        ValueError: As :func:`initialise_from_meta`.
    """
    places = _materialise(module, names, device)
    initialise_by_name(module, seed, names)
    unset = [place.name for place in places if not _is_set(place)]
    if unset:
        raise ValueError(
            f"the model was built on the meta device, and nothing gave {listed(unset)} a value: what a constructor "
            "computes is lost there. Write it in reset_parameters() of the module that has it (a buffer too: "
            "self.name.copy_(...)), or build the model on a real device"
        )
    left = [
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        if prefix in names
        for name, value in vars(child).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if left:
        raise ValueError(
            f"{listed(left)} of the model is a plain tensor on the meta device, and has no value; make it a buffer: "
            "self.register_buffer(name, tensor, persistent=False), filled in reset_parameters()"
        )


class _Touched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """Notes which memory operations read or write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.memory |= {tensor.untyped_storage()._cdata for tensor in tree.tensors([args, kwargs or {}])}
        return func(*args, **kwargs or {})


def separable(module: nn.Module, parts: Sequence[Collection[str]]) -> bool:
    """Tell whether each part of a model on the meta device can be initialised by itself.

    The model's initialisation is tried where it is, which costs nothing: where a module's ``reset_parameters`` touches
    only tensors of its own part, the others need not be there.

    Args:
        module: On the meta device, with nothing elsewhere.
        parts: The names of the modules in each part; every module is in one.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))
        >>> separable(model, [["0"], ["1", ""]])
        True
    """
    if not all(tensor.is_meta for _, _, _, tensor in _tensors(module)):
        return False
    owner: dict[int, int] = {}
    for number, part in enumerate(parts):
        for _, _, _, tensor in _tensors(module, part):
            if owner.setdefault(tensor.untyped_storage()._cdata, number) != number:
                return False
    for number, part in enumerate(parts):
        try:
            with _Touched() as touched:
                initialise_by_name(module, 0, part)
        except (RuntimeError, NotImplementedError):  # it looks at values
            return False
        if any(owner.get(memory, number) != number for memory in touched.memory):
            return False
    return True


def _tensors(
    module: nn.Module, names: Collection[str] | None = None
) -> Iterator[tuple[dict[str, Any], str, str, Tensor]]:
    for prefix, child in module.named_modules():
        if names is not None and prefix not in names:
            continue
        for held in (child._parameters, child._buffers):
            for attribute, tensor in held.items():
                if tensor is not None:
                    yield held, attribute, f"{prefix}.{attribute}" if prefix else attribute, tensor


def _materialise(module: nn.Module, names: Collection[str], device: torch.device) -> list[_Place]:
    """Give every tensor memory of its own, but one memory to those that share one; say where those from meta are."""
    objects: dict[int, Tensor] = {}
    memory: dict[int, Tensor] = {}
    kept = list(_tensors(module, names))  # so that no address is used again meanwhile
    places = []
    for held, attribute, name, old in kept:
        new = objects.get(id(old))
        if new is None:
            new = objects[id(old)] = _like(
                old, _memory(old, device, memory) if old.is_meta else old.detach().to(device)
            )
        held[attribute] = new
        if old.is_meta:
            places.append(_Place(held, attribute, name, new, new._version))
    return places


def _memory(old: Tensor, device: torch.device, memory: dict[int, Tensor]) -> Tensor:
    """Make the memory of a tensor on meta, filled with what says that it has no value."""
    storage = old.untyped_storage()
    if storage._cdata not in memory:
        byte = _UNSET_FLOAT if old.is_floating_point() or old.is_complex() else _UNSET_INTEGER
        memory[storage._cdata] = torch.full((storage.nbytes(),), byte, dtype=torch.uint8, device=device)
    return memory[storage._cdata].view(old.dtype).as_strided(old.shape, old.stride(), old.storage_offset())


def _like(old: Tensor, data: Tensor) -> Tensor:
    """Make a parameter of a parameter, with its attributes, and a buffer of a buffer."""
    if not isinstance(old, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _is_set(place: _Place) -> bool:
    now = place.held.get(place.attribute)
    if now is not place.tensor or now.numel() == 0:
        return now is None or not now.is_meta
    if now.element_size() == 1:  # no byte is free to say that there is no value
        return now._version != place.version
    bits = (torch.view_as_real(now) if now.is_complex() else now).detach()
    byte = _UNSET_FLOAT if bits.is_floating_point() else _UNSET_INTEGER
    unset = int.from_bytes(bytes([byte]) * bits.element_size(), "little", signed=True)
    return not bool((bits.view(_INTEGERS[bits.element_size()]) == unset).any())
