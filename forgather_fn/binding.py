"""A module bound to a state: its parameters *are* the views of the state's flat storage.

The hot path calls the real module, with its hooks and its autograd leaves, on the state's own memory. A program may
have many states; a module is bound to one at a time, and binding it to another is some pointer assignments.
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import flat as flat_storage
from forgather_fn.flat import Flat, Hyper, Layout, layout_of
from forgather_fn.model import Site, Slot, buffer_names, buffer_slots, check_apart, parameter_anatomy

_bound: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Binding]]" = weakref.WeakKeyDictionary()
"""Which binding a module follows. Neither is kept alive by it: a binding lives as long as its program."""


def _binding_of(module: nn.Module) -> "Binding | None":
    reference = _bound.get(module)
    return None if reference is None else reference()


class Place(Protocol):
    """Put parameters that are not plain tensors of the module, but its shards, on the tensors of a state."""

    def __call__(self, params: Flat, frozen: Mapping[str, Tensor], /) -> None:
        """Make the module stand on these."""
        ...


@attrs.define(eq=False)
class Binding:
    """The one mutable thing of a program: which state its module stands on.

    Attributes:
        module: The real module.
        layout: Of the trainable parameters.
        trainable: Where they are in the module, each with its name.
        still: The same for those that are not trained.
        buffer_slots: Where buffers are, or may come to be.
        params: The flat storage that the module's parameters are views of now; None while it is not bound.
        frozen: What its other parameters are.
        buffers: The flat storage that its buffers are views of.
        place: Puts parameters that are in none of the places above.
    """

    module: nn.Module
    layout: Layout
    trainable: tuple[tuple[Site, str], ...]
    still: tuple[tuple[Site, str], ...]
    buffer_slots: tuple[Slot, ...]
    params: Flat | None = None
    frozen: Mapping[str, Tensor] = attrs.field(factory=dict)
    buffers: Flat | None = None
    place: Place | None = None
    _tied_buffers: Mapping[str, str] = attrs.field(factory=dict)
    _asked: Mapping[nn.Parameter, bool] = attrs.field(factory=dict)
    _pointers: tuple[tuple[dict[str, Any], str, nn.Parameter, int], ...] = ()
    _looked: bool = False

    def ensure(self, params: Flat, frozen: Mapping[str, Tensor], buffers: Flat) -> bool:
        """Make the module stand on these tensors, whatever it stood on.

        Returns:
            Whether it was found as it had been left; if not, its gradients may lie elsewhere too.

        Raises:
            ValueError: The module's parameters were changed from outside in a way that would be lost.
        """
        intact = self._intact()
        if intact and params is self.params and buffers is self.buffers and frozen is self.frozen:
            return True
        if not intact and self.params is not None and _binding_of(self.module) is self:
            self._explain(self.params)
        self.bind(params, frozen, buffers)
        return intact

    def bind(self, params: Flat, frozen: Mapping[str, Tensor], buffers: Flat) -> None:
        """Point the module's parameters and buffers at the views of these tensors; make its ``state_dict`` safe."""
        taking_over = _binding_of(self.module) is not self
        if taking_over:
            _make_safe_to_save(self.module)
        for sites, tensors in ((self.trainable, params), (self.still, frozen)):
            for site, name in sites:
                site.tensor.data = tensors[name]
                if taking_over:
                    site.tensor.requires_grad_(tensors is params)
                site.module._parameters[site.attribute] = site.tensor
        if self.place is not None:
            self.place(params, frozen)
        self.bind_buffers(buffers)
        self.params, self.frozen = params, frozen
        self._pointers = tuple(
            (site.module._parameters, site.attribute, site.tensor, site.tensor.data_ptr())
            for site, _ in (*self.trainable, *self.still)
        )
        _bound[self.module] = weakref.ref(self)

    def bind_buffers(self, buffers: Flat) -> None:
        """Point the module's buffers at the views of these; slots that have none become None."""
        for slot in self.buffer_slots:
            slot.held[slot.attribute] = self._buffer_of(slot, buffers)
        self.buffers = buffers

    def _buffer_of(self, slot: Slot, buffers: Flat) -> Tensor | None:
        name = self._buffer_name(slot, buffers.layout.index)
        return buffers.alias(name) if name in buffers.layout.index else None

    def _buffer_name(self, slot: Slot, held: Container[str]) -> str:
        return slot.name if slot.name in held else self._tied_buffers.get(slot.name, slot.name)

    def buffer_places(self, held: Container[str]) -> dict[str, str]:
        """Give the places in the module that hold one of these buffers, each with the name of what it holds."""
        named = {slot.name: self._buffer_name(slot, held) for slot in self.buffer_slots}
        return {place: name for place, name in named.items() if name in held}

    def placed(
        self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], buffers: Mapping[str, Tensor], layout: Layout
    ) -> dict[str, Tensor]:
        """Give every tensor of the module by its place, tied ones at each: for ``functional_call``."""
        places = {site.name: params[name] for site, name in self.trainable}
        places |= {site.name: frozen[name] for site, name in self.still}
        return places | {place: buffers[name] for place, name in self.buffer_places(layout.index).items()}

    def _intact(self) -> bool:
        for held, attribute, parameter, pointer in self._pointers:
            if held.get(attribute) is not parameter or parameter.data_ptr() != pointer:
                return False
        return self.params is not None

    def _explain(self, params: Flat) -> None:
        """Tell moves that keep every value, which are undone with a notice, from changes that would be lost."""
        for site, name in (*self.trainable, *self.still):
            now = site.module._parameters.get(site.attribute)
            held = params[name] if name in params else self.frozen[name]
            if now is None or not _same(now.detach(), held):
                found = "gone" if now is None else f"{tuple(now.shape)} {now.dtype}"
                raise ValueError(
                    f"{name} of the bound module was replaced from outside (it was {tuple(held.shape)} {held.dtype}, "
                    f"is {found}, or has other values). The state would overwrite it. Write values in place "
                    "(load_state_dict without assign=True), or make a new program and call init() to start from what "
                    "the module holds now."
                )
        warnings.warn(
            "the bound module's parameters were moved to other memory (.to(), .double(), ...) with equal values; they "
            "are bound to the state again",
            stacklevel=6,
        )

    def release(self) -> None:
        """Forget the binding: changes from outside are no surprise any more, and ``requires_grad`` is the user's."""
        for sites, ours in ((self.trainable, True), (self.still, False)):
            for site, _ in sites:
                if site.tensor.requires_grad is ours:  # not what the user has set in between
                    site.tensor.requires_grad_(self._asked[site.tensor])
        self.params = self.buffers = None
        self._pointers = ()
        _bound.pop(self.module, None)

    def check_buffers(self) -> None:
        """Look, once, after the first forward pass, whether it made places for buffers that were not there before.

        Raises:
            ValueError: It did; going back to an earlier state could not take them away.
        """
        if self._looked:
            return
        new = {slot.name for slot in buffer_slots(self.module)} - {slot.name for slot in self.buffer_slots}
        if new:
            raise ValueError(
                f"forward registered new buffers: {flat_storage.listed(sorted(new))}. Register "
                'them in __init__, as None if their shape is not known: self.register_buffer("name", None)'
            )
        self._looked = True

    def restore_ties(self, copied: nn.Module) -> None:
        """Make the parameters of a copy of the module share memory, and ask for gradients, as its own did."""
        params = dict(copied.named_parameters(remove_duplicate=False))
        for site, name in (*self.trainable, *self.still):
            params[site.name].data = params[name].data
            params[site.name].requires_grad_(self._asked[site.tensor])
            params[site.name].grad = None

    def read_buffers(self) -> Flat:
        """Copy the buffers as a forward pass left them; adopt what it reassigned, resized, made, or removed."""
        buffers = self.buffers
        assert buffers is not None
        if all(slot.tensor is self._buffer_of(slot, buffers) for slot in self.buffer_slots):
            return buffers.copy()
        names = buffer_names(self.buffer_slots)
        values = {
            slot.name: slot.tensor.detach()
            for slot in self.buffer_slots
            if slot.tensor is not None and names[slot.name] == slot.name
        }
        return _stored(values, buffers)

    def store_buffers(self, values: Mapping[str, Tensor], like: Flat) -> None:
        """Point the module's buffers at copies of these, in storage that is laid out as this one where it can be."""
        self.bind_buffers(_stored(values, like))


def _stored(values: Mapping[str, Tensor], like: Flat) -> Flat:
    device = next((value.device for value in values.values()), torch.device("cpu"))
    same = _kinds(values) == _kinds(like)
    return flat_storage.filled(like.layout if same else layout_of(values), values, device)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.to(other.device), other)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def attach(module: nn.Module, hypers: Mapping[str, Hyper]) -> Binding:
    """Prepare a module for binding: plan the storage of what is trained.

    Args:
        module: On the device where it is to be trained.
        hypers: The hyperparameters of each parameter that asks for gradients, by name.
    """
    anatomy = parameter_anatomy(module)
    trained = {name: p for name, p in anatomy.params.items() if name in hypers and not hypers[name].frozen}
    slots = buffer_slots(module)
    check_apart(slots, anatomy)
    return Binding(
        module=module,
        layout=layout_of(trained, {name: hypers[name] for name in trained}),
        trainable=tuple((site, name) for site, name in anatomy.sites if name in trained),
        still=tuple((site, name) for site, name in anatomy.sites if name not in trained),
        buffer_slots=slots,
        tied_buffers=buffer_names(slots),
        asked={site.tensor: site.tensor.requires_grad for site, _ in anatomy.sites},
    )


def bound(module: nn.Module) -> bool:
    """Tell whether a module stands on a state of some program."""
    return _binding_of(module) is not None


def unbind(module: nn.Module) -> None:
    """Take a module away from whatever program it is bound to, and give its tensors memory of their own."""
    binding = _binding_of(module)
    if binding is not None:
        binding.release()
    for child in module.modules():
        for number in [n for n, hook in child._state_dict_hooks.items() if hook is _own_storage]:
            del child._state_dict_hooks[number]
    anatomy = parameter_anatomy(module)
    for parameter in anatomy.params.values():
        parameter.data = parameter.data.clone()
    anatomy.retie()
    slots = buffer_slots(module)
    names = buffer_names(slots)
    copies = {
        slot.name: slot.tensor.clone() for slot in slots if slot.tensor is not None and names[slot.name] == slot.name
    }
    for slot in slots:
        if slot.tensor is not None:
            slot.held[slot.attribute] = copies[names[slot.name]]


def _make_safe_to_save(module: nn.Module) -> None:
    for child in module.modules():
        if _own_storage not in child._state_dict_hooks.values():
            child.register_state_dict_post_hook(_own_storage)  # type: ignore[no-untyped-call]


_copies: dict[int, dict[tuple[Any, ...], Tensor]] = {}


def _own_storage(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give the tensors of a ``state_dict`` storage of their own; tied tensors stay tied.

    Views of one storage are refused, or silently dropped, by safetensors, and written as the whole buffer each by
    ``torch.save``.
    """
    del module, metadata
    copies: dict[tuple[Any, ...], Tensor] = {}
    if isinstance(state, OrderedDict):  # as torch makes it: one for the hooks of all modules of one call
        if id(state) not in _copies:
            _copies[id(state)] = copies
            weakref.finalize(state, _copies.pop, id(state), None)
        copies = _copies[id(state)]
    for name, tensor in state.items():
        if not name.startswith(prefix) or not isinstance(tensor, Tensor) or tensor.requires_grad:
            continue
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place not in copies:
                copies[place] = tensor.clone()
            state[name] = copies[place]
