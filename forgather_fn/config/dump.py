"""Dumping: a graph to text that parses to the same graph."""

from collections.abc import Iterator
from typing import Any, Final

from yaml import events as ev

from forgather_fn.config.emit import emitted, scalar_event
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Call, Graph, Items, Node, Pairs, Ref, Scalar

_TAGS: Final = {"singleton": "call", "factory": "factory", "partial": "partial", "meta": "meta"}


def dump(graph: Graph) -> str:
    r"""Write a graph as text: ``parse(dump(graph)) == graph``.

    Example:
        >>> from forgather_fn.config import parse
        >>> print(dump(parse("lr: &lr [1e-5]\nmain: !call:dict {lr: *lr}")))
        lr: &n1
        - 1.0e-05
        main: !call:dict
          lr: *n1
    """
    return emitted(_Dump(graph).events())


class _Dump:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.uses = graph.uses()
        self.written: set[Ref] = set()
        taken = {node.name for node in graph.nodes if isinstance(node, Items | Pairs | Call) and node.name}
        self.anchors = {
            ref: self._anchor(ref, graph.nodes[ref], taken) for ref, count in enumerate(self.uses) if count > 1
        }

    def _anchor(self, ref: Ref, node: Node, taken: set[str]) -> str:
        own = node.name if isinstance(node, Items | Pairs | Call) else None
        name = own or f"n{ref}"
        while own is None and name in taken:
            name += "_"
        taken.add(name)
        return name

    def events(self) -> Iterator[ev.Event]:
        yield ev.MappingStartEvent(None, None, True, flow_style=not self.graph.targets)
        for name, ref in self.graph.targets.items():
            if name.startswith("."):
                raise ConfigError(f"target {name!r}: what begins with a dot is no target")
            yield scalar_event(name)
            yield from self.node(ref)
        yield ev.MappingEndEvent()

    def node(self, ref: Ref) -> Iterator[ev.Event]:
        if ref in self.written:
            yield ev.AliasEvent(self.anchors[ref])
            return
        node, anchor = self.graph.nodes[ref], self.anchors.get(ref)
        if isinstance(node, Scalar):
            yield scalar_event(node.value)
        elif isinstance(node, Items):
            tag = _tag(node.kind, node.name) if node.tagged else None
            yield from self.sequence(anchor, tag, node.items)
        elif isinstance(node, Pairs):
            tag = _tag(node.kind, node.name) if node.tagged else None
            yield from self.mapping(anchor, tag, node.items)
        elif isinstance(node, Call):
            yield from self.call(anchor, node)
        elif node.default is None:
            yield scalar_event(node.variable, anchor=anchor, tag="!var")
        else:
            yield ev.MappingStartEvent(anchor, "!var", False, flow_style=False)
            yield scalar_event("name")
            yield scalar_event(node.variable)
            yield scalar_event("default")
            yield from self.node(node.default)
            yield ev.MappingEndEvent()
        if anchor is not None:
            self.written.add(ref)

    def call(self, anchor: str | None, node: Call) -> Iterator[ev.Event]:
        tag = _tag(f"{_TAGS[node.kind]}:{node.target}", node.name)
        if not node.kwargs:
            yield from self.sequence(anchor, tag, node.args)
            return
        names = [name for name, _ in node.kwargs]
        if not node.args and not any(_is_special(name) for name in names):
            yield from self.mapping(anchor, tag, node.kwargs)
            return
        yield ev.MappingStartEvent(anchor, tag, False, flow_style=False)
        yield scalar_event("args")
        yield from self.sequence(None, None, node.args)
        yield scalar_event("kwargs")
        yield from self.mapping(None, None, node.kwargs)
        yield ev.MappingEndEvent()

    def sequence(self, anchor: str | None, tag: str | None, items: tuple[Ref, ...]) -> Iterator[ev.Event]:
        yield ev.SequenceStartEvent(anchor, tag, tag is None, flow_style=not items)
        for ref in items:
            yield from self.node(ref)
        yield ev.SequenceEndEvent()

    def mapping(self, anchor: str | None, tag: str | None, items: tuple[tuple[Any, Ref], ...]) -> Iterator[ev.Event]:
        yield ev.MappingStartEvent(anchor, tag, tag is None, flow_style=not items)
        for key, ref in items:
            yield scalar_event(key)
            yield from self.node(ref)
        yield ev.MappingEndEvent()


def _is_special(name: str) -> bool:
    return name in ("args", "kwargs") or (name.startswith("arg") and name[3:].isdigit())


def _tag(kind: str, name: str | None) -> str:
    return f"!{kind}{f'@{name}' if name else ''}" if ":" in kind or not name else f"!{kind}:@{name}"
