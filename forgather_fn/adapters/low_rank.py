"""Low-rank adapters: a few trained numbers beside the weights of a model, which stay as they are."""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forgather_fn.binding import bound
from forgather_fn.describe import Described, describe
from forgather_fn.flat import listed
from forgather_fn.groups import Predicate, matches
from forgather_fn.model import ModelFactory, anatomy_of
from forgather_fn.signature import checked

M = TypeVar("M", nn.Module, ModelFactory)

NAME: Final = "lora"
"""What the adapter of a layer is called in it: its parameters are ``<layer>.lora.A`` and ``<layer>.lora.B``."""


class LowRank(nn.Module):
    """The adapter of one layer: a matrix ``alpha / rank * B A``, as its two factors.

    Attributes:
        A: ``[rank, inputs]``.
        B: ``[outputs, rank]``.
        scale: ``alpha / rank``.
    """

    initialises_itself = True

    def __init__(self, layer: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        weight = cast(Tensor, layer.weight)
        self.looks_up = isinstance(layer, nn.Embedding)
        self.transposed = self.looks_up or not isinstance(layer, nn.Linear)  # as Conv1D of transformers has it
        outputs, inputs = weight.shape[::-1] if self.transposed else weight.shape
        self.padding = layer.padding_idx if isinstance(layer, nn.Embedding) else None
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.A = nn.Parameter(weight.new_empty(rank, inputs))
        self.B = nn.Parameter(weight.new_empty(outputs, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw one factor, and make the other zero: of a layer A is drawn, of an embedding B, as by the authors."""
        with torch.no_grad():
            if self.looks_up:
                self.A.zero_()
                self.B.normal_()
            else:
                nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
                self.B.zero_()

    @property
    def zero(self) -> str:
        """The factor that is zero at first."""
        return "A" if self.looks_up else "B"

    def forward(self, inputs: Tensor) -> Tensor:
        """Give what is added to the layer's outputs."""
        if self.looks_up:
            return (F.embedding(inputs, self.A.T, self.padding) @ self.B.T) * self.scale
        return F.linear(F.linear(self.dropout(inputs), self.A), self.B) * self.scale

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """Give what these factors add to the weight, in the weight's shape, in float32 or more."""
        exact = torch.promote_types(A.dtype, torch.float32)
        product = (B.to(exact) @ A.to(exact)) * self.scale
        return product.T if self.transposed else product


@attrs.frozen(eq=False)
class Adapted:
    """The forward of a layer with an adapter. An object and not a closure, so that a copy has one of its own."""

    layer: nn.Module
    __wrapped__: Callable[..., Any]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Give what the layer gives, and what its adapter adds."""
        out: Tensor = self.__wrapped__(inputs)
        return out + cast(Tensor, self.layer.lora(inputs))  # type: ignore[operator]


@checked
def lora(
    model: M, match: str | Predicate, *, rank: int, alpha: float, dropout: float = 0.0, also: str | Predicate = ""
) -> M:
    """Train low-rank adapters of some weights, and nothing else: ``W`` acts as ``W + alpha / rank * B A``.

    The model's own parameters keep their names and ask for no gradient, so that states share them. One factor of each
    adapter is zero at first, so that the first outputs are the model's. The numbers are those of ``peft``, given the
    same first factors.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

    Args:
        model: A module, which is changed in place and returned; or a factory of one, of which another is made.
        match: Which weights: a pattern of their qualified names (``"*.[qv]_proj.weight"``), or a predicate of name and
            tensor. They are those of ``nn.Linear``, ``nn.Embedding``, and the ``Conv1D`` of transformers; parameters of
            one dimension (biases, gains) are passed over.
        rank: Of each product.
        alpha: The scale, times ``rank``.
        dropout: The probability with which an input of a layer's adapter is zeroed; those of embeddings have none.
        also: Parameters that are trained themselves besides, such as a new head: ``"head.*"``.

    Raises:
        ValueError: At once, or, of a factory, when the model is built: nothing matches; a weight that matches is of
            another kind of layer, tied to another, or not read by its layer's ``forward``; a number is out of range; or
            the module has adapters, or stands on a state of a program.

    Example:
        >>> model = lora(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), "0.weight", rank=2, alpha=4)
        >>> {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
        {'0.weight': ((3, 4), False), '0.bias': ((3,), False), '0.lora.A': ((2, 4), True), '0.lora.B': ((3, 2), True)}
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora: rank must be an integer of at least 1, got {rank!r}")
    if not (math.isfinite(alpha) and alpha > 0 and 0 <= dropout < 1):
        raise ValueError(f"lora: alpha must be positive and dropout in [0, 1); got alpha={alpha}, dropout={dropout}")
    adapt = functools.partial(_adapt, match=match, rank=rank, alpha=alpha, dropout=dropout, also=also)
    if isinstance(model, nn.Module):
        return adapt(model)
    if not callable(model):
        raise ValueError(f"lora: model must be a torch.nn.Module or a function that builds one, got {model!r}")
    given = f"match={describe(match)}, rank={rank}, alpha={alpha}, dropout={dropout}, also={describe(also)}"
    return cast(M, Described(functools.partial(_built, model, adapt), f"lora({describe(model)}, {given})"))


def _built(factory: ModelFactory, adapt: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return adapt(factory())


def _adapt(
    module: nn.Module, match: str | Predicate, rank: int, alpha: float, dropout: float, also: str | Predicate
) -> nn.Module:
    check_free(module, "lora")
    if adapters_of(module):
        raise ValueError(f"lora: the model has adapters already: {listed(list(adapters_of(module)))}")
    anatomy = anatomy_of(module)
    owners = {site.name: site.module for site, _ in anatomy.sites}
    weights = [n for n, p in anatomy.params.items() if matches(match, n, p) and (p.dim() > 1 or callable(match))]
    for name in weights:
        sites = [site.name for site, own in anatomy.sites if own == name]
        _check_layer(module, name, owners[name], sites)
    trained = {name for name, p in anatomy.params.items() if also and matches(also, name, p)}
    for what, pattern, found in (("match", match, weights), ("also", also, trained)):
        if pattern and not found:
            raise ValueError(f"lora: {what}={describe(pattern)} chooses nothing of {listed(list(anatomy.params), 10)}")
    for name, parameter in anatomy.params.items():
        parameter.requires_grad_(name in trained)
    for name in weights:
        layer = owners[name]
        layer.add_module(NAME, LowRank(layer, rank, alpha, dropout))
        layer.forward = Adapted(layer, layer.forward)
    return module


def _check_layer(root: nn.Module, name: str, layer: nn.Module, sites: list[str]) -> None:
    """Make sure that what is added to the outputs of a layer's forward is all that its weight does."""
    kinds: list[type[nn.Module]] = [nn.Linear, nn.Embedding]
    if "transformers.pytorch_utils" in sys.modules:
        kinds.append(sys.modules["transformers.pytorch_utils"].Conv1D)
    known = type(layer).forward in [kind.forward for kind in kinds] and cast(Tensor, layer.weight).is_floating_point()
    if not known or not name.endswith("weight"):
        raise ValueError(
            f"lora: {name} is of a {type(layer).__name__}; there are adapters for the weights of nn.Linear, "
            "nn.Embedding, and the Conv1D of transformers"
        )
    if len(sites) > 1:
        raise ValueError(
            f"lora: {name} is also {listed(sites[1:])}; an adapter would change one use of it, and merging it both. "
            "Match other weights, or untie it: give one of them a copy"
        )
    parent = root.get_submodule(name.removesuffix(".weight").rpartition(".")[0]) if "." in name else None
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):  # the latter in evaluation
        raise ValueError(f"lora: {name} is read by its {type(parent).__name__} past the layer's forward; match others")


def check_free(module: nn.Module, what: str) -> None:
    """Make sure that a module may be changed.

    Raises:
        ValueError: It stands on a state of a program.
    """
    if bound(module):
        raise ValueError(
            f"{what}: the module stands on a state of a program, which would not know of the change; give it a copy: "
            "program.export(state)"
        )


def adapters_of(module: nn.Module) -> dict[str, LowRank]:
    """Find the adapters in a model, by the names of the weights that they belong to."""
    return {
        f"{name}.weight" if name else "weight": child.lora
        for name, child in module.named_modules()
        if isinstance(getattr(child, NAME, None), LowRank)
    }
