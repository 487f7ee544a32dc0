"""The graph: what a configuration says is to be built, as plain data. Nothing in it is a live object."""

import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import attrs

from forgather_fn.config import bounds
from forgather_fn.config.errors import UNKNOWN, ConfigError, Position
from forgather_fn.config.scalars import Value

Ref = int
"""A node, by its place in :attr:`Graph.nodes`."""

_SPEC: Final = re.compile(r"(?:(?P<module>[A-Za-z_][\w.]*|[^\0\n]+\.py):)?(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
IDENTIFIER: Final = re.compile(r"[A-Za-z_]\w*")


def _same_value(value: Value) -> tuple[str, str]:
    return type(value).__name__, repr(value)  # 1, 1.0 and True differ, and nan is itself


@attrs.frozen
class Scalar:
    """A plain value."""

    value: Value = attrs.field(eq=_same_value)
    where: Position = attrs.field(default=UNKNOWN, eq=False, repr=False)


@attrs.frozen
class Items:
    """A list or a tuple.

    Attributes:
        kind: What is built.
        items: Its elements.
        name: Given by ``@name``.
        tagged: Whether it was given by a tag: then all uses share one object.
        where: In the templates.
    """

    kind: Literal["list", "tuple"]
    items: tuple[Ref, ...]
    name: str | None = None
    tagged: bool = False
    where: Position = attrs.field(default=UNKNOWN, eq=False, repr=False)


@attrs.frozen
class Pairs:
    """A dict; or a ``dlist``, whose values are built into a list. As :class:`Items`, but for keys.

    The order of keys is that of their first occurrence.
    """

    kind: Literal["dict", "dlist"]
    items: tuple[tuple[Value, Ref], ...] = attrs.field(eq=lambda items: [(_same_value(k), ref) for k, ref in items])
    name: str | None = None
    tagged: bool = False
    where: Position = attrs.field(default=UNKNOWN, eq=False, repr=False)


@attrs.frozen
class Call:
    """A function or class, and what it is called with.

    Attributes:
        kind: ``singleton`` is called once in a build, ``factory`` at each occurrence; ``partial`` becomes a
            ``functools.partial``; ``meta`` is called with graphs of its arguments instead of their values.
        target: A builtin's name, ``package.module:Name.attribute``, or ``/path/file.py:Name``.
        args: Positional arguments.
        kwargs: Arguments by name.
        name: Given by ``@name``.
        where: In the templates.
    """

    kind: Literal["singleton", "factory", "partial", "meta"]
    target: str
    args: tuple[Ref, ...] = ()
    kwargs: tuple[tuple[str, Ref], ...] = ()
    name: str | None = None
    where: Position = attrs.field(default=UNKNOWN, eq=False, repr=False)


@attrs.frozen
class Var:
    """A value that is given when the graph is built; where it is not, a default."""

    variable: str
    default: Ref | None = None
    where: Position = attrs.field(default=UNKNOWN, eq=False, repr=False)


Node = Scalar | Items | Pairs | Call | Var


@attrs.frozen
class Graph:
    """What a configuration says: targets, and the nodes that they are made of.

    A node that several others refer to is in the graph once, so that what is shared is seen, and compared.

    Attributes:
        nodes: Those that targets reach, each after what it refers to, in the order in which they would be built.
        targets: The root of each, by name.
    """

    nodes: tuple[Node, ...]
    targets: Mapping[str, Ref]

    def uses(self) -> list[int]:
        """Count, for each node, how often it is referred to, by nodes and targets."""
        found = [0] * len(self.nodes)
        for node in self.nodes:
            for ref in children(node):
                found[ref] += 1
        for ref in self.targets.values():
            found[ref] += 1
        return found


def children(node: Node) -> Iterator[Ref]:
    """Give what a node refers to, in the order in which it is built."""
    if isinstance(node, Items):
        yield from node.items
    elif isinstance(node, Pairs):
        yield from (ref for _, ref in node.items)
    elif isinstance(node, Call):
        yield from node.args
        yield from (ref for _, ref in node.kwargs)
    elif isinstance(node, Var) and node.default is not None:
        yield node.default


def split_target(target: str) -> tuple[str | None, str]:
    """Split the target of a call into its module, or file, and the name in it; None for a builtin's.

    Raises:
        ConfigError: It is neither.

    Example:
        >>> split_target("torch.nn:Linear"), split_target("str.format")
        (('torch.nn', 'Linear'), (None, 'str.format'))
    """
    match = _SPEC.fullmatch(target)
    if match is None:
        raise ConfigError(
            f"{target!r} is nothing that can be called: expected package.module:Name, /path/file.py:Name, or a "
            "builtin such as dict"
        )
    return match["module"], match["name"]


def graph_of(nodes: Mapping[Ref, Node], targets: Mapping[str, Ref]) -> Graph:
    """Put nodes in order, without those that no target reaches, and check their bounds.

    A scalar that is referred to several times becomes several: it has nothing to share.

    Raises:
        ConfigError: The graph has a circle, is too deep or too large, or two of its nodes have one name.
    """
    placed: dict[Ref, Ref] = {}
    made: list[Node] = []
    under_way: set[Ref] = set()
    sizes: list[tuple[int, int]] = []

    def place(ref: Ref, depth: int) -> Ref:
        node = nodes[ref]
        if ref in placed and not isinstance(node, Scalar):
            return placed[ref]
        if ref in under_way:
            raise ConfigError("this refers to itself", node.where)
        if depth > bounds.DEPTH:
            raise ConfigError(f"more than {bounds.DEPTH} levels lie in each other", node.where)
        under_way.add(ref)
        new: list[Ref] = [place(child, depth + 1) for child in children(node)]
        under_way.discard(ref)
        _check_size(node, [sizes[child] for child in new], sizes)
        iterator = iter(new)
        made.append(_renumbered(node, iterator))
        placed[ref] = len(made) - 1
        return placed[ref]

    graph = Graph(nodes=(), targets={name: place(ref, 0) for name, ref in targets.items()})
    graph = attrs.evolve(graph, nodes=tuple(made))
    _check_names(graph)
    return graph


def _renumbered(node: Node, refs: Iterator[Ref]) -> Node:
    if isinstance(node, Items):
        return attrs.evolve(node, items=tuple(refs))
    if isinstance(node, Pairs):
        return attrs.evolve(node, items=tuple((key, next(refs)) for key, _ in node.items))
    if isinstance(node, Call):
        args = tuple(next(refs) for _ in node.args)
        return attrs.evolve(node, args=args, kwargs=tuple((key, next(refs)) for key, _ in node.kwargs))
    if isinstance(node, Var) and node.default is not None:
        return attrs.evolve(node, default=next(refs))
    return node


def _check_size(node: Node, inside: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> None:
    depth = 1 + max((depth for depth, _ in inside), default=0)
    count = 1 + sum(count for _, count in inside)
    if depth > bounds.DEPTH:
        raise ConfigError(f"more than {bounds.DEPTH} levels lie in each other, through aliases", node.where)
    if count > bounds.NODES or len(sizes) >= bounds.NODES:
        raise ConfigError(f"this has more than {bounds.NODES:,} parts, aliases expanded", node.where)
    sizes.append((depth, count))


def _check_names(graph: Graph) -> None:
    named: dict[str, Node] = {}
    for node in graph.nodes:
        name = node.name if isinstance(node, Items | Pairs | Call) else None
        if name is not None and name in named:
            raise ConfigError(f"two nodes are named @{name}, the other at {named[name].where}", node.where)
        if name is not None:
            named[name] = node
