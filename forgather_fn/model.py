"""What a module is made of: its parameters and buffers by name, which are tied, and how it is called."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.describe import describe
from forgather_fn.losses import Loss, Objective
from forgather_fn.losses.calling import call_arguments as call_arguments
from forgather_fn.losses.calling import is_hugging_face
from forgather_fn.random import key, seeded

ModelFactory = Callable[[], nn.Module]


@attrs.frozen(eq=False)
class Site:
    """One attribute of a module that holds a parameter: ``module._parameters[attribute]``."""

    module: nn.Module
    attribute: str
    name: str
    tensor: nn.Parameter


@attrs.frozen(eq=False)
class Anatomy:
    """A module's tensors. A tied tensor has one name, the first, and several sites.

    Attributes:
        params: Every parameter by its first name.
        sites: Each site of a parameter with the name of what it holds.
    """

    params: dict[str, nn.Parameter]
    sites: tuple[tuple[Site, str], ...]

    def retie(self) -> None:
        """Point tied parameters at one memory again, after a conversion has given each its own."""
        for site, name in self.sites:
            site.tensor.data = self.params[name].data


def parameter_anatomy(module: nn.Module) -> Anatomy:
    """Find the parameters of a module, tied ones once; tied is what shares memory, as an object or as storage only.

    Raises:
        ValueError: A parameter is lazy, has no data, or shares only a part of its memory with another.
    """
    found = anatomy_of(module)
    for site, _ in found.sites:
        if site.tensor.is_meta:
            raise ValueError(
                f"{site.name} is on the meta device and has no values; build the model on a real device, or have it "
                'initialised: Plan(init="by_name")'
            )
    return found


def anatomy_of(module: nn.Module) -> Anatomy:
    """Find the parameters of a module as :func:`parameter_anatomy` does, also where they have no values yet."""
    for site in _sites(module):
        _check_parameter(site)
    sites = parameter_sites(module)
    params = {name: site.tensor for site, name in sites if name == site.name}
    _check_overlap(params)
    return Anatomy(params, sites)


def parameter_sites(module: nn.Module) -> tuple[tuple[Site, str], ...]:
    """Give each place of a parameter with the name of what it holds, the first."""
    names: dict[tuple[Any, ...], str] = {}
    return tuple((site, names.setdefault(_place(site.tensor), site.name)) for site in _sites(module))


@attrs.frozen(eq=False)
class Slot:
    """One place for a buffer in a module, whether it holds one now or None."""

    held: dict[str, Tensor | None]
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """What it holds now."""
        return self.held.get(self.attribute)


def buffer_slots(module: nn.Module) -> tuple[Slot, ...]:
    """Find all places for buffers in a module.

    Raises:
        ValueError: A buffer is lazy.
    """
    slots = tuple(
        Slot(child._buffers, attribute, f"{prefix}.{attribute}" if prefix else attribute)
        for prefix, child in module.named_modules()
        for attribute in child._buffers
    )
    for slot in slots:
        _check_shape(slot.name, slot.tensor)
    return slots


def check_apart(slots: Sequence[Slot], anatomy: Anatomy) -> None:
    """Make sure that no buffer lies in the memory of a parameter, from which binding would cut it off.

    Raises:
        ValueError: One does.
    """
    params = {p.untyped_storage().data_ptr(): name for name, p in anatomy.params.items() if p.numel()}
    for slot in slots:
        place = slot.tensor.untyped_storage().data_ptr() if slot.tensor is not None and slot.tensor.numel() else None
        if place in params:
            raise ValueError(f"buffer {slot.name} shares the memory of parameter {params[place]}; clone it: .clone()")


def buffer_names(slots: Sequence[Slot]) -> dict[str, str]:
    """Name what each slot holds; a tensor that several hold has the first one's name."""
    names: dict[tuple[Any, ...], str] = {}
    return {slot.name: names.setdefault(_place(slot.tensor), slot.name) for slot in slots if slot.tensor is not None}


def _sites(module: nn.Module) -> Iterator[Site]:
    for prefix, child in module.named_modules():
        for attribute, tensor in child._parameters.items():
            if tensor is not None:
                yield Site(child, attribute, f"{prefix}.{attribute}" if prefix else attribute, tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Identify a tensor by its memory, so that aliases are found; an empty one only by itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    start = (tensor.untyped_storage()._cdata, tensor.storage_offset()) if tensor.is_meta else (tensor.data_ptr(),)
    return (tensor.device, *start, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_parameter(site: Site) -> None:
    _check_shape(site.name, site.tensor)
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag) and site.module.max_norm is not None:
        raise ValueError(
            f"{site.name} is changed by every forward pass (max_norm={site.module.max_norm}), so that even an "
            "evaluation would change the state; build the embedding with max_norm=None"
        )
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag) and site.module.sparse:
        raise ValueError(
            f"{site.name} asks for sparse gradients, which flat storage does not hold; build the embedding with "
            "sparse=False"
        )


def _check_shape(name: str, tensor: Tensor | None) -> None:
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise ValueError(
            f"{name} is lazy and has no shape yet; run the model once on an example batch before it is given to a "
            "plan: model(example)"
        )


def _check_overlap(params: Mapping[str, nn.Parameter]) -> None:
    placed = {name: p for name, p in params.items() if p.numel() and not p.is_meta}
    spans = sorted((p.data_ptr(), p.data_ptr() + _span(p), name) for name, p in placed.items())
    for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise ValueError(
                f"{one} and {other} share a part of their memory; parameters must be the same tensor or have memory of "
                f"their own. Clone one of them: {other} = nn.Parameter({other}.clone())"
            )


def _span(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def build(model: nn.Module | ModelFactory, seed: int) -> nn.Module:
    """Give the module itself, or build one from its factory under a key of the seed.

    Raises:
        ValueError: It is neither a module nor a function that returns one, or a compiled one of TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model is a {type(model).__name__}, whose parameters TorchScript keeps to itself: give the module that it "
            "was made of, and compile with Plan(compile=True)"
        )
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        with seeded(key(seed, "init"), torch.device("cpu")), _called_without_arguments(model):
            built = model()
        if isinstance(built, nn.Module):
            return built
        raise ValueError(f"the model factory returned {type(built).__name__}; expected a torch.nn.Module")
    raise ValueError(f"model must be a torch.nn.Module or a function that builds one, got {type(model).__name__}")


@contextlib.contextmanager
def _called_without_arguments(model: ModelFactory) -> Iterator[None]:
    """Say of a model that wants arguments who calls it."""
    try:
        yield
    except TypeError as error:
        error.add_note(
            f"while building the plan's model: {describe(model)} is called without arguments; where it takes some, "
            "give Plan(model=lambda: Model(...)), or the module itself"
        )
        raise


def initialise_by_name(module: nn.Module, seed: int, among: Collection[str] | None = None) -> None:
    """Initialise module by module, each under a key of its own name, children before their parents.

    The values then depend on names alone, not on the order of construction, so that any part of a model, built alone,
    starts as it does in the whole. Each module's own ``reset_parameters`` is used (``_reset_parameters`` for
    attention), or, in Hugging Face models, the model's ``_init_weights``, but for modules that are not Hugging Face's
    and say so (``initialises_itself = True``).

    Args:
        module: Changed in place.
        seed: Of the run.
        among: The names of the modules in it that are initialised; None for all.

    Raises:
        ValueError: A module has parameters of its own and none of these.
    """
    chosen = [(name, child) for name, child in module.named_modules() if among is None or name in among]
    device = next((p.device for _, child in chosen for p in child.parameters(recurse=False)), torch.device("cpu"))
    hugging_face = is_hugging_face(module)
    with torch.no_grad():
        for name, child in reversed(chosen):
            reset = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
            initialise = module._init_weights if hugging_face else None
            own = [p for p in child.parameters(recurse=False) if p is not None]
            if reset is None and initialise is None and own:
                raise ValueError(
                    f'init="by_name": {name or "the model"} ({type(child).__name__}) has parameters of its own, but no '
                    "reset_parameters(); give it one that draws their values"
                )
            with seeded(key(seed, "init", name), device):
                if callable(initialise) and not getattr(child, "initialises_itself", False):
                    initialise(child)
                elif reset is not None:
                    reset()


def class_of(module: nn.Module) -> type[nn.Module]:
    """Give the class of a module, as it was before torch's ``fully_shard`` put one of its own in front."""
    kind = type(module)
    return kind if not getattr(kind, "_orig_cls_mro_index", 0) else kind.__mro__[kind._orig_cls_mro_index]  # type: ignore[attr-defined]


def enter_training(module: nn.Module) -> None:
    """Put a module that is in evaluation mode as a whole into training mode; keep modes that were set part by part."""
    if not module.training:
        module.train()


@attrs.frozen(eq=False)
class Modes:
    """The training flags of every module, to be put back after an evaluation."""

    flags: tuple[tuple[nn.Module, bool], ...]

    def restore(self) -> None:
        """Put each module's own flag back, whatever was set in between."""
        for module, training in self.flags:
            module.training = training


def evaluation_mode(module: nn.Module) -> Modes:
    """Switch a module to evaluation, and remember the mode of each of its parts."""
    modes = Modes(tuple((child, child.training) for child in module.modules()))
    module.eval()
    return modes


def surrounded(module: nn.Module, loss: Loss) -> contextlib.AbstractContextManager[None]:
    """Give the context in which a module is called for a loss."""
    if isinstance(loss, Objective) and loss.around is not None:
        return loss.around(module)
    return contextlib.nullcontext()
