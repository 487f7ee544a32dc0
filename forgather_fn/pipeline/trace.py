"""Where each tensor of a run comes from: of which stage it is, and which module has made it."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from forgather_fn.pipeline.cuts import SplitError

_SHAPES_ONLY: Final = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
)
"""Operations whose result does not depend on the values that they are given."""


@attrs.frozen
class Origin:
    """Where a tensor was made: by which module (the model itself has no name); None if it has just crossed a cut."""

    stage: int
    module: str | None


@attrs.frozen(eq=False)
class Owner:
    """A parameter or buffer, by the memory that it takes; many may lie in one storage."""

    name: str
    buffer: bool
    start: int
    stop: int
    stages: set[int] = attrs.field(factory=set)


def owners_of(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[int, list[Owner]]:
    """Find the tensors of a model by their storage, each once, in the order of their memory."""
    found: dict[int, dict[int, Owner]] = {}
    for kind in (params, buffers):
        for name, tensor in kind.items():
            start, reach = (
                tensor.data_ptr(),
                sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)),
            )
            stop = start + (reach + 1) * tensor.element_size()
            held = found.setdefault(tensor.untyped_storage()._cdata, {})
            held.setdefault(start, Owner(name, kind is buffers, start, stop))
    return {storage: [held[start] for start in sorted(held)] for storage, held in found.items()}


@attrs.define(eq=False)
class Trace:
    """What is known while the model runs.

    Attributes:
        owners: Parameters and buffers, by their storage.
        stage: Which one runs.
        modules: The names of those that run, outer ones first.
        origins: Where what has been made comes from, by its storage.
        crossed: The storages of hidden states that have crossed a cut, with the stage that takes each.
        written: Stages that write into the hidden state that they take.
        weights: Which parameters a tensor was made of, where it was made of nothing else; by its storage.
        uses: How often a stage brings a parameter together with a hidden state.
        held: Storages, so that no other tensor comes to lie there.
    """

    owners: Mapping[int, Sequence[Owner]]
    stage: int = 0
    modules: list[str] = attrs.field(factory=list)
    origins: dict[int, Origin] = attrs.field(factory=dict)
    crossed: dict[int, int] = attrs.field(factory=dict)
    written: set[int] = attrs.field(factory=set)
    weights: dict[int, frozenset[str]] = attrs.field(factory=dict)
    uses: "Counter[tuple[int, str]]" = attrs.field(factory=Counter)
    held: list[Any] = attrs.field(factory=list)

    def cross(self, hidden: Tensor) -> None:
        """Go on to the next stage, which takes this hidden state."""
        self.stage += 1
        storage = hidden.untyped_storage()
        self.held.append(storage)
        self.origins[storage._cdata] = Origin(self.stage, None)
        self.crossed[storage._cdata] = self.stage
        self.weights.pop(storage._cdata, None)  # the first stage makes it of nothing but parameters and the batch

    def write(self, tensor: Tensor) -> None:
        """Note that a tensor is written to."""
        stage = self.crossed.get(tensor.untyped_storage()._cdata)
        if stage is not None:
            self.written.add(stage)

    def mark(self, tensor: Tensor) -> None:
        """Note that a tensor was made in this stage; its memory is held, so that no other is taken for it."""
        storage = tensor.untyped_storage()
        self.held.append(storage)
        self.origins[storage._cdata] = Origin(self.stage, self.modules[-1] if self.modules else "")

    def owner(self, tensor: Tensor) -> Owner:
        """Tell which parameter or buffer a tensor is a view of."""
        own = self.owners[tensor.untyped_storage()._cdata]
        return own[max(0, bisect.bisect_right(own, tensor.data_ptr(), key=lambda owner: owner.start) - 1)]

    def use(self, given: Sequence[Tensor]) -> frozenset[str]:
        """Note which parameters an operation brings together with a hidden state; else give those that it is made of.

        Args:
            given: Those of its arguments that are of some stage.
        """
        names, alone = frozenset[str](), True
        for tensor in given:
            place = tensor.untyped_storage()._cdata
            made = frozenset({self.owner(tensor).name}) if place in self.owners else self.weights.get(place)
            names, alone = names | (made or frozenset()), alone and made is not None
        if alone:
            return names
        self.uses.update((self.stage, name) for name in names)
        return frozenset()

    def read(self, tensor: Tensor) -> bool:
        """Note that a tensor is read, and tell whether it is of any stage.

        Raises:
            SplitError: It is of a stage before.
        """
        place = tensor.untyped_storage()._cdata
        if place in self.owners:
            owner = self.owner(tensor)
            owner.stages.add(self.stage)
            return not owner.buffer
        origin = self.origins.get(place)
        if origin is None:
            return False
        if origin.stage < self.stage:
            raise SplitError(_SKIP.format(producer=_named(origin.module), consumer=_named(self.modules[-1])))
        return True


_SKIP: Final = (
    "the model cannot be cut there: {consumer}, after the cut, reads what {producer} has made before it, and only one "
    "hidden state crosses a cut. Cut where no such connection leads across, or write stages by hand: pipeline.Stages"
)


def _named(module: str | None) -> str:
    return repr(module) if module else "the model itself"


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Follows every operation, also those that need no gradient."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        name = func._overloadpacket.__name__
        if name in _SHAPES_ONLY:
            return func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            for tensor in _written(func._schema, args, kwargs or {}):
                self.trace.write(tensor)
        staged = [self.trace.read(tensor) for tensor in given]  # all of them are noted
        result = func(*args, **(kwargs or {}))
        if any(staged):
            made = self.trace.use([tensor for tensor, one in zip(given, staged, strict=True) if one])
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.trace.owners:
                    self.trace.mark(leaf)
                    if made:
                        self.trace.weights[leaf.untyped_storage()._cdata] = made
        return result


def _written(schema: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Give the tensors that an operation writes to."""
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            leaves = tree_flatten(given.get(argument.name))[0]
            yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))
