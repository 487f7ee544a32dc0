"""Gradients as a value: what a step computes, transforms change, and an optimizer uses up."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import attrs
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from forgather_fn.flat import Chunk, Flat, Layout, listed
from forgather_fn.wide import wide, wide_norm


class Summed(Protocol):
    """Add numbers up over the processes that have the other shards of a gradient."""

    def __call__(self, numbers: Tensor, /) -> Tensor:
        """Give the sums of the float64 numbers of all processes, on each of them; every process calls it."""
        ...


@attrs.frozen(eq=False)
class Spread:
    """How a gradient is spread over processes, for what is to be known of all of it.

    Attributes:
        summed: Adds numbers up over the processes.
        shards: Whether each has a shard of every parameter's gradient; else they have those of other parameters.
        foreign: Names of parameters here that another process has too, and counts.
    """

    summed: Summed
    shards: bool
    foreign: frozenset[str] = frozenset()


@attrs.frozen(eq=False, repr=False)
class Gradients(Mapping[str, Tensor]):
    """The gradient of one step, by the name of the parameter, before or after transforms.

    A parameter that took no part in the loss has no entry. The values alias a buffer that the next step reuses where
    they come from ``program.step``; those of ``program.gradients`` are yours.

    Attributes:
        layout: Of the parameters.
        active: Which leaves of the layout have a gradient.
        views: The gradient of each active parameter, before the division by ``divisor``.
        flat: The storage that the views are of; None where each gradient has storage of its own.
        samples: How many samples it is of.
        weight: The weight of the objective over them.
        divisor: A scalar that every element is still to be divided by; fused optimizers do it on the way.
        known_norm: The 2-norm of the views, where it has been computed.
        reports: Named scalars that transforms report.
        spread: How it is spread over processes; None where each has all of it.
        cursor: Where the data goes on after their batch; see :class:`~forgather_fn.state.TrainState`.
    """

    layout: Layout
    active: tuple[bool, ...]
    views: Mapping[str, Tensor]
    flat: Flat | None
    samples: int
    weight: Tensor | float
    divisor: Tensor | None = None
    known_norm: Tensor | None = None
    reports: Mapping[str, Tensor] = MappingProxyType({})
    spread: Spread | None = None
    cursor: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        view = self.views[name]
        return view if self.divisor is None else view / self.divisor.to(view.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def __repr__(self) -> str:
        return f"Gradients({sum(view.numel() for view in self.views.values()):,} elements in {len(self)} tensors)"

    def whole(self) -> tuple[Tensor, ...]:
        """Give tensors that together are the gradient, and nothing else but zeros: as few as there can be."""
        return self.flat.buffers if self.flat is not None else tuple(self.views.values())

    def slices(self, chunks: tuple[Chunk, ...]) -> tuple[Tensor, ...]:
        """Cut the gradient as the parameters are cut for an update; see :meth:`~forgather_fn.flat.Flat.slices`."""
        if self.flat is not None:
            return self.flat.slices(chunks)
        return tuple([self.views[str(chunk.name)] for chunk in chunks])

    def measured(self) -> "Gradients":
        """Compute the 2-norm of the views, a scalar in at least float32, and keep it as ``known_norm``."""
        if self.known_norm is not None:
            return self
        whole = self.whole()
        if self.spread is not None:
            dtype = torch.float64 if torch.float64 in self.layout.dtypes else torch.float32
            norm = self.square_sums([self.views])[0].sqrt().to(dtype)
        elif len(whole) == 1:
            norm = wide_norm(whole[0])
        else:
            norm = get_total_norm([*map(wide, whole)])
        return self._with(self.divisor, norm, self.reports)

    def square_sums(self, groups: Sequence[Collection[str]]) -> Tensor:
        """Add up the squares of the views of some groups of parameters, over all processes; float64, one to a group."""
        foreign = self.spread.foreign if self.spread is not None else ()
        sums = [self._square_sum([name for name in names if name not in foreign]) for names in groups]
        here = torch.stack(sums)
        return here if self.spread is None else self.spread.summed(here)

    def _square_sum(self, names: Collection[str]) -> Tensor:
        if self.flat is not None and len(names) == len(self.layout.leaves):
            return squares(self.flat.buffers).sum()
        if not names:
            whole = self.whole()
            return torch.zeros((), dtype=torch.float64, device=whole[0].device if whole else None)
        return squares([self.views[name] for name in names]).sum()

    def unmeasured(self) -> "Gradients":
        """Forget the norm, because the values may be changed in place."""
        return self if self.known_norm is None else self._with(self.divisor, None, self.reports)

    def norm(self) -> Tensor:
        """Give the 2-norm over all elements, as divided."""
        norm = self.measured().known_norm
        assert norm is not None
        return norm if self.divisor is None else norm / self.divisor.abs()

    def divided(self, divisor: Tensor, **reports: Tensor) -> "Gradients":
        """Divide every element by a scalar on the device, done when the values are next needed.

        Args:
            divisor: A floating scalar.
            reports: Named scalars, to appear among the step's metrics.
        """
        divisor = divisor if self.divisor is None else self.divisor * divisor
        return self._with(divisor, self.known_norm, {**self.reports, **reports})

    def reporting(self, **reports: Tensor) -> "Gradients":
        """Attach named scalars, to appear among the step's metrics."""
        return self._with(self.divisor, self.known_norm, {**self.reports, **reports})

    def resolved(self) -> "Gradients":
        """Carry out what :meth:`divided` has put off, in place."""
        if self.divisor is None:
            return self
        norm = self.norm() if self.known_norm is not None else None
        for tensor in self.whole():
            tensor.div_(self.divisor)
        return self._with(None, norm, self.reports)

    def having(self, active: tuple[bool, ...]) -> "Gradients":
        """Say which leaves have a gradient, where other processes have added theirs to the flat buffers."""
        if active == self.active:
            return self
        assert self.flat is not None
        names = itertools.compress(self.layout.index, active)
        return attrs.evolve(self, active=active, views={name: self.flat.alias(name) for name in names})

    def narrowed(self, layout: Layout) -> "Gradients":
        """Round sums that were taken in float32 to the types of the parameters, of which this is the layout."""
        if self.layout is layout:
            return self
        flat = None
        if self.flat is not None:
            pairs = zip(self.flat.buffers, layout.dtypes, strict=True)
            flat = Flat(layout, tuple([buffer.to(dtype) for buffer, dtype in pairs]))
        types = {leaf.name: leaf.dtype for leaf in layout.leaves}
        views = {name: flat[name] if flat is not None else view.to(types[name]) for name, view in self.views.items()}
        return attrs.evolve(self, layout=layout, flat=flat, views=views, known_norm=None)

    def for_kernel(self) -> "Gradients":
        """Leave to a fused kernel what it can do exactly: it divides by a float32 scalar; any other is carried out."""
        return self if self.divisor is None or self.divisor.dtype == torch.float32 else self.resolved()

    def _with(self, divisor: Tensor | None, norm: Tensor | None, reports: Mapping[str, Tensor]) -> "Gradients":
        # Three times as fast as attrs.evolve, on the way of every step.
        return Gradients(
            self.layout,
            self.active,
            self.views,
            self.flat,
            self.samples,
            self.weight,
            divisor,
            norm,
            reports,
            self.spread,
            self.cursor,
        )

    def copy(self) -> "Gradients":
        """Copy to storage of its own, of the same form, so that whatever follows is the same to the bit."""
        flat = None if self.flat is None else self.flat.copy()
        views = {name: view.clone() if flat is None else flat[name] for name, view in self.views.items()}
        return attrs.evolve(self, flat=flat, views=views)

    def replaced(self, tensors: Mapping[str, Tensor], by: str) -> "Gradients":
        """Take other values under the same names, in place.

        Raises:
            ValueError: Names, shapes, or data types differ.
        """
        if set(tensors) != set(self.views):
            odd = sorted(set(tensors) ^ set(self.views))
            raise ValueError(
                f"transform {by}: it must return a gradient for every name it was given; differs in {listed(odd)}"
            )
        for name, view in self.views.items():
            new = tensors[name]
            if new.shape != view.shape or new.dtype != view.dtype:
                raise ValueError(
                    f"transform {by}: it changed {name} from {tuple(view.shape)} {view.dtype} to {tuple(new.shape)} "
                    f"{new.dtype}; a transform keeps shapes and data types"
                )
        moved = {name: tensor for name, tensor in tensors.items() if tensor is not self.views[name]}
        safe = moved
        if not torch.compiler.is_compiling():  # in a graph nothing is overwritten before it is read
            held = {view.untyped_storage().data_ptr() for view in self.views.values()}
            safe = {n: t.clone() if t.untyped_storage().data_ptr() in held else t for n, t in moved.items()}
        for name, tensor in safe.items():
            self.views[name].copy_(tensor)
        return self._with(None, None, self.reports)


def norms(tensors: Mapping[str, Tensor], spread: Spread | None = None) -> dict[str, Tensor]:
    """Compute the 2-norm of each tensor, in at least float32.

    Args:
        tensors: Gradients or parameters, by name.
        spread: How they are spread over processes; None where each has all of them.
    """
    if spread is None or not spread.shards:
        return {name: wide_norm(tensor) for name, tensor in tensors.items()}
    found = spread.summed(squares(list(tensors.values()))).sqrt()
    return {
        name: norm.to(tensor.dtype if tensor.dtype.itemsize > 4 else torch.float32)
        for (name, tensor), norm in zip(tensors.items(), found, strict=True)
    }


PIECE: Final = 1 << 18
"""Elements that are widened at a time: on a CPU, torch copies what it computes in another data type."""


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """Give the sum of squares of each tensor, float64."""
    return torch.stack([_square(tensor) for tensor in tensors])


def _square(tensor: Tensor) -> Tensor:
    pieces = torch.split(tensor.reshape(-1), PIECE) if tensor.device.type == "cpu" else (tensor,)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    return torch.stack(norms).square().sum()
