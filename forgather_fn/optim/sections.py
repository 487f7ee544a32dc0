"""Sections of flat storage: what one optimizer of a composed one works on, without copying."""

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import attrs

from forgather_fn.flat import Flat, Layout, Leaf
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import Hyper


@attrs.frozen(eq=False)
class Section:
    """The leaves of a layout that are of one part: a range of each buffer that they lie in.

    Attributes:
        part: The part.
        layout: Of the leaves, as if there were no others.
        numbers: Their indices in the whole layout.
        ranges: Where they lie: buffer, first element, and behind the last, for each buffer of ``layout``.
    """

    part: str
    layout: Layout
    numbers: tuple[int, ...]
    ranges: tuple[tuple[int, int, int], ...]

    def of(self, flat: Flat) -> Flat:
        """Give the section of flat storage: views of its buffers, made once."""
        found: dict[str, Flat] = flat.kept.setdefault("sections", {})
        if self.part not in found:
            ranges = tuple(flat.buffers[buffer][start:stop] for buffer, start, stop in self.ranges)
            views = {name: flat[name] for name in self.layout.index}  # of the whole buffers, which a compiler can tell
            found[self.part] = Flat(self.layout, ranges, views=views)
        return found[self.part]

    def gradients(self, gradients: Gradients) -> Gradients:
        """Give the gradient of the leaves, by itself."""
        return Gradients(
            self.layout,
            tuple([gradients.active[i] for i in self.numbers]),
            {name: gradients.views[name] for name in self.layout.index if name in gradients.views},
            None if gradients.flat is None else self.of(gradients.flat),
            gradients.samples,
            gradients.weight,
            gradients.divisor,
        )


_KNOWN: WeakKeyDictionary[Layout, dict[str, Section]] = WeakKeyDictionary()


def sections(layout: Layout) -> Mapping[str, Section]:
    """Give the section of each part of a layout; see :attr:`Hyper.part <forgather_fn.hyper.Hyper>`."""
    if layout not in _KNOWN:
        parts = dict.fromkeys(_head(hyper) for hyper in layout.groups)
        _KNOWN[layout] = {part: _section(layout, part) for part in parts}
    return _KNOWN[layout]


def _head(hyper: Hyper) -> str:
    return hyper.part.partition("/")[0]


def _section(whole: Layout, part: str) -> Section:
    numbers = tuple(i for i, leaf in enumerate(whole.leaves) if _head(whole.groups[leaf.group]) == part)
    own = [whole.leaves[i] for i in numbers]
    groups = sorted({leaf.group for leaf in own})
    buffers = sorted({leaf.buffer for leaf in own})
    starts = {buffer: min(leaf.offset for leaf in own if leaf.buffer == buffer) for buffer in buffers}
    stops = {buffer: max(leaf.offset + leaf.extent for leaf in own if leaf.buffer == buffer) for buffer in buffers}

    def moved(leaf: Leaf) -> Leaf:
        return attrs.evolve(
            leaf,
            buffer=buffers.index(leaf.buffer),
            offset=leaf.offset - starts[leaf.buffer],
            group=groups.index(leaf.group),
        )

    layout = Layout(
        leaves=tuple(moved(leaf) for leaf in own),
        groups=tuple(attrs.evolve(whole.groups[i], part=whole.groups[i].part.partition("/")[2]) for i in groups),
        sizes=tuple(stops[buffer] - starts[buffer] for buffer in buffers),
        dtypes=tuple(whole.dtypes[buffer] for buffer in buffers),
        index={leaf.name: i for i, leaf in enumerate(own)},
        elements=sum(math.prod(leaf.shape) for leaf in own),
    )
    return Section(part, layout, numbers, tuple((buffer, starts[buffer], stops[buffer]) for buffer in buffers))
