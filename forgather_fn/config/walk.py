"""The walk over a graph that gives one target: what it makes of the nodes is an argument."""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import attrs

from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Call, Graph, Items, Pairs, Ref, Scalar, Var, graph_of

T = TypeVar("T")


class Maker(Protocol[T]):
    """What is made of each kind of node. Parts are made before the whole, from left to right."""

    def scalar(self, node: Scalar, /) -> T:
        """Make a plain value."""
        ...

    def items(self, node: Items, items: Sequence[T], /) -> T:
        """Make a list or tuple."""
        ...

    def pairs(self, node: Pairs, values: Sequence[T], /) -> T:
        """Make a dict, or the list of a dlist; the values are in the order of the node's keys."""
        ...

    def variable(self, node: Var, default: Callable[[], T] | None, /) -> T:
        """Look up a variable; the default is made when it is called."""
        ...

    def call(self, node: Call, args: Sequence[T], kwargs: Sequence[tuple[str, T]], key: str, /) -> T:
        """Call, or make what can be called later."""
        ...

    def meta(self, node: Call, args: Sequence[Graph], kwargs: Sequence[tuple[str, Graph]], key: str, /) -> T:
        """Call with graphs."""
        ...


def make(graph: Graph, target: str, maker: Maker[T]) -> T:
    """Make a target of a graph.

    A singleton, a partial, and a tagged list or dict is made once. A plain list or dict that is referred to once is
    made where it stands: once, or, inside of a factory, each time; with several references it is one object.

    Raises:
        ConfigError: There is no such target.
    """
    if target not in graph.targets:
        raise ConfigError(f"there is no target {target!r}: the configuration has {', '.join(graph.targets) or 'none'}")
    return _Walk(graph, maker, graph.uses()).visit(graph.targets[target], target)


@attrs.frozen(eq=False)
class _Walk(Generic[T]):
    graph: Graph
    maker: Maker[T]
    uses: list[int]
    made: dict[Ref, T] = attrs.field(factory=dict)

    def visit(self, ref: Ref, key: str) -> T:
        if ref in self.made:
            return self.made[ref]
        made = self._make(ref, key)
        if self._is_shared(ref):
            self.made[ref] = made
        return made

    def _is_shared(self, ref: Ref) -> bool:
        node = self.graph.nodes[ref]
        if isinstance(node, Items | Pairs):
            return node.tagged or self.uses[ref] > 1
        return not (isinstance(node, Scalar) or (isinstance(node, Call) and node.kind == "factory"))

    def _make(self, ref: Ref, key: str) -> T:
        node = self.graph.nodes[ref]
        if isinstance(node, Scalar):
            return self.maker.scalar(node)
        if isinstance(node, Items):
            return self.maker.items(node, [self.visit(one, f"{key}[{i}]") for i, one in enumerate(node.items)])
        if isinstance(node, Pairs):
            return self.maker.pairs(node, [self.visit(one, f"{key}.{name}") for name, one in node.items])
        if isinstance(node, Var):
            default = node.default
            return self.maker.variable(node, None if default is None else lambda: self.visit(default, key))
        if node.kind == "meta":
            graphs = [self._subgraph(one) for one in node.args]
            return self.maker.meta(node, graphs, [(name, self._subgraph(one)) for name, one in node.kwargs], key)
        args = [self.visit(one, f"{key}[{i}]") for i, one in enumerate(node.args)]
        kwargs = [(name, self.visit(one, f"{key}.{name}")) for name, one in node.kwargs]
        return self.maker.call(node, args, kwargs, key)

    def _subgraph(self, ref: Ref) -> Graph:
        return graph_of(dict(enumerate(self.graph.nodes)), {"main": ref})
