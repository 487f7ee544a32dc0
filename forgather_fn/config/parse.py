"""Parsing: text to a graph. Nothing is imported, and nothing runs."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, cast

import yaml
from yaml import events as ev

from forgather_fn.config import bounds
from forgather_fn.config.blocks import meant
from forgather_fn.config.errors import ConfigError, Position
from forgather_fn.config.graph import (
    Call,
    Graph,
    Items,
    Node,
    Pairs,
    Ref,
    Scalar,
    Var,
    graph_of,
)
from forgather_fn.config.hints import nearest
from forgather_fn.config.scalars import Value, scalar
from forgather_fn.config.tags import CALLS, LISTS, MAPPINGS, SCALARS, Tag, tag_of
from forgather_fn.config.text import origin

_ARGUMENT: Final = re.compile(r"arg(\d{1,6})")


def parse(text: str) -> Graph:
    """Parse a configuration.

    Where a key is there twice, the last value counts, in the place of the first. Keys that begin with a dot are no
    targets; what is anchored under them can be referred to.

    Args:
        text: YAML with tags, such as :func:`~forgather_fn.config.render.render` gives; its positions go into messages.

    Raises:
        ConfigError: It is not valid, or larger or deeper than is allowed.

    Example:
        >>> graph = parse("main: !partial:torch.optim:AdamW {lr: 1e-5}")
        >>> graph.nodes
        (Scalar(value=1e-05), Call(kind='partial', target='torch.optim:AdamW', args=(), kwargs=(('lr', 0),), name=None))
    """
    if not isinstance(text, str):
        raise ConfigError(f"parse takes text, such as render gives, got {type(text).__name__}")
    if len(text) > bounds.SOURCE:
        raise ConfigError(f"the text has {len(text):,} characters; at most {bounds.SOURCE:,} are allowed")
    try:
        return _Parser(text).graph()
    except yaml.MarkedYAMLError as error:
        marks = [mark for mark in (error.context_mark, error.problem_mark) if mark]
        places = [origin(text, mark.line) for mark in marks]
        place = next((one for one in places if meant(one.text)), places[-1] if places else None)
        hint = meant(place.text) if place else ""
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"not valid YAML{context}: {error.problem}{hint}", place) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not valid YAML: {error}") from None


class _Parser:
    """Builds nodes while events come in, depth first; anchors count from their node's end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.events: Iterator[ev.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.nodes: dict[Ref, Node] = {}
        self.anchors: dict[str, Ref] = {}
        self.opened: set[str] = set()
        self.merges = 0

    def graph(self) -> Graph:
        next(self.events)  # the stream's start
        event = next(self.events)
        if isinstance(event, ev.StreamEndEvent):
            return Graph((), {})
        root = next(self.events)
        if isinstance(root, ev.ScalarEvent) and not root.value and not root.tag:
            targets: dict[str, Ref] = {}
        elif isinstance(root, ev.MappingStartEvent) and root.tag is None:
            targets = {}
            for key, ref in self.pairs("", 0):
                if not isinstance(key, str):
                    raise ConfigError(f"{key!r} is no name of a target: expected a string", self.nodes[ref].where)
                if not key.startswith("."):
                    targets[key] = ref
        else:
            raise ConfigError("expected a mapping of targets", self.place(root))
        next(self.events)  # the document's end
        if not isinstance(event := next(self.events), ev.StreamEndEvent):
            raise ConfigError("expected one document, found another", self.place(event))
        return graph_of(self.nodes, targets)

    def node(self, event: ev.Event, path: str, depth: int) -> Ref:
        if depth > bounds.DEPTH:
            raise ConfigError(f"more than {bounds.DEPTH} levels lie in each other", self.place(event), path)
        if isinstance(event, ev.AliasEvent):
            if event.anchor in self.anchors:
                return self.anchors[event.anchor]
            near = nearest(str(event.anchor), self.anchors)
            known = "this lies inside of it" if event.anchor in self.opened else "no anchor before this has that name"
            raise ConfigError(
                f"*{event.anchor}: {known}{f'; did you mean *{near}?' if near else ''}", self.place(event), path
            )
        assert isinstance(event, ev.NodeEvent)
        if event.anchor is not None:
            self.opened.add(event.anchor)
            self.anchors.pop(event.anchor, None)
        tag = self.tag(event, path)
        if isinstance(event, ev.ScalarEvent):
            made = self.scalar(event, tag, path)
        elif isinstance(event, ev.SequenceStartEvent):
            made = self.sequence(event, tag, path, depth)
        else:
            made = self.mapping(event, tag, path, depth)
        ref = self.add(made)
        if event.anchor is not None:
            self.anchors[event.anchor] = ref
        return ref

    def add(self, node: Node) -> Ref:
        if len(self.nodes) >= bounds.NODES:
            raise ConfigError(f"more than {bounds.NODES:,} nodes", node.where)
        self.nodes[len(self.nodes)] = node
        return len(self.nodes) - 1

    def place(self, event: ev.Event) -> Position:
        return origin(self.text, event.start_mark.line if event.start_mark else 0)

    def tag(self, event: Any, path: str) -> Tag | None:
        try:
            tag = None if event.tag is None else tag_of(event.tag)
        except ConfigError as error:
            raise ConfigError(error.problem, self.place(event), path) from None
        if tag is not None and tag.kind in SCALARS and not isinstance(event, ev.ScalarEvent):
            raise ConfigError(f"!!{tag.kind} takes a plain value", self.place(event), path)
        return tag

    def scalar(self, event: ev.ScalarEvent, tag: Tag | None, path: str) -> Node:
        text, where = event.value, self.place(event)
        if tag is None:
            plain = event.implicit[0] and event.style is None
            return Scalar(scalar(text) if plain else text, where)
        if tag.kind in SCALARS:
            return Scalar(self.converted(text, tag.kind, event, path), where)
        if tag.kind == "var":
            return self.variable(text, None, event, path)
        if tag.kind in CALLS:
            args = (self.add(Scalar(text, where)),) if text else ()
            return self.call(tag, args, (), where)
        if text:
            raise ConfigError(f"!{tag.kind} takes a sequence or mapping, got {text!r}", where, path)
        return self.container(tag, where)

    def converted(self, text: str, kind: str, event: ev.Event, path: str) -> Value:
        value = text if kind == "str" else scalar(text)
        if kind == "float" and isinstance(value, int):
            value = float(value)
        if kind != ("null" if value is None else type(value).__name__):
            raise ConfigError(f"!!{kind} {text!r}: this is no {kind}", self.place(event), path)
        return value

    def sequence(self, event: ev.SequenceStartEvent, tag: Tag | None, path: str, depth: int) -> Node:
        where = self.place(event)
        items: list[Ref] = []
        while not isinstance(inner := next(self.events), ev.SequenceEndEvent):
            items.append(self.node(inner, f"{path}[{len(items)}]", depth + 1))
        if tag is None:
            return Items("list", tuple(items), where=where)
        if tag.kind in CALLS:
            return self.call(tag, tuple(items), (), where)
        if tag.kind not in LISTS:
            raise ConfigError(f"!{tag.kind} takes a mapping, got a sequence", where, path)
        kind = cast(Literal["list", "tuple"], tag.kind)
        return Items(kind, tuple(items), tag.name, tagged=True, where=where)

    def mapping(self, event: Any, tag: Tag | None, path: str, depth: int) -> Node:
        where, pairs = self.place(event), self.pairs(path, depth)
        if tag is None:
            return Pairs("dict", tuple(pairs), where=where)
        if tag.kind == "var":
            given = dict(pairs)
            name = self.nodes[given["name"]] if "name" in given else None
            if not isinstance(name, Scalar) or not isinstance(name.value, str) or given.keys() - {"name", "default"}:
                raise ConfigError("!var takes a name, or {name: NAME, default: VALUE}", where, path)
            return self.variable(name.value, given.get("default"), event, path)
        if tag.kind in CALLS:
            odd = [key for key, _ in pairs if not isinstance(key, str)]
            if odd:
                raise ConfigError(f"{odd[0]!r} is no name of an argument: expected a string", where, path)
            return self.call(tag, *self.arguments(cast(list[tuple[str, Ref]], pairs)), where)
        if tag.kind not in MAPPINGS:
            raise ConfigError(f"!{tag.kind} takes a sequence, got a mapping", where, path)
        if tag.kind == "dlist":
            pairs = [(key, ref) for key, ref in pairs if self.nodes[ref] != Scalar(None)]
        kind = cast(Literal["dict", "dlist"], tag.kind)
        return Pairs(kind, tuple(pairs), tag.name, tagged=True, where=where)

    def pairs(self, path: str, depth: int) -> list[tuple[Value, Ref]]:
        """Read a mapping: the last value of a key, in the place of the first; merged keys give way to its own."""
        own: dict[tuple[str, Value], tuple[Value, Ref]] = {}
        merged: dict[tuple[str, Value], tuple[Value, Ref]] = {}
        while not isinstance(inner := next(self.events), ev.MappingEndEvent):
            if not isinstance(inner, ev.ScalarEvent) or inner.anchor or inner.tag:
                place = self.place(inner)
                raise ConfigError(f"a key must be a plain value{meant(place.text)}", place, path)
            plain = inner.implicit[0] and inner.style is None
            key = scalar(inner.value) if plain else inner.value
            below = f"{path}.{key}" if path else str(key)
            ref = self.node(next(self.events), below, depth + 1)
            if plain and inner.value == "<<":
                for name, value in self.merged(ref, below):
                    merged.setdefault((type(name).__name__, name), (name, value))
                    self.merges += 1
                    if self.merges > bounds.NODES:
                        raise ConfigError(f"more than {bounds.NODES:,} keys are merged", self.place(inner), below)
            else:
                own[type(key).__name__, key] = (key, ref)
        return [*{**merged, **own}.values()]

    def merged(self, ref: Ref, path: str) -> Iterator[tuple[Value, Ref]]:
        node = self.nodes[ref]
        if isinstance(node, Pairs) and node.kind == "dict":
            yield from node.items
        elif isinstance(node, Items) and node.kind == "list":
            for one in node.items:
                yield from self.merged(one, path)
        else:
            raise ConfigError("<< takes a mapping, or a list of mappings", node.where, path)

    def arguments(self, pairs: list[tuple[str, Ref]]) -> tuple[tuple[Ref, ...], tuple[tuple[str, Ref], ...]]:
        """Tell positional arguments from those by name."""
        given = dict(pairs)
        args, kwargs = (self.nodes[given[name]] if name in given else None for name in ("args", "kwargs"))
        if given and not given.keys() - {"args", "kwargs"}:
            listed = args is None or (isinstance(args, Items) and args.kind == "list")
            mapped = kwargs is None or (isinstance(kwargs, Pairs) and kwargs.kind == "dict")
            if listed and mapped and all(isinstance(key, str) for key, _ in getattr(kwargs, "items", ())):
                return getattr(args, "items", ()), getattr(kwargs, "items", ())
        numbered = {int(match[1]): ref for key, ref in pairs if (match := _ARGUMENT.fullmatch(key))}
        named = tuple((key, ref) for key, ref in pairs if not _ARGUMENT.fullmatch(key))
        return tuple(ref for _, ref in sorted(numbered.items())), named

    def call(self, tag: Tag, args: tuple[Ref, ...], kwargs: tuple[tuple[str, Ref], ...], where: Position) -> Call:
        return Call(CALLS[tag.kind], tag.target, args, kwargs, tag.name, where)

    def container(self, tag: Tag, where: Position) -> Node:
        empty: Callable[..., Node] = Items if tag.kind in LISTS else Pairs
        return empty(tag.kind, (), tag.name, tagged=True, where=where)

    def variable(self, name: str, default: Ref | None, event: ev.Event, path: str) -> Var:
        if not name or not name.strip():
            raise ConfigError("!var takes a name, or {name: NAME, default: VALUE}", self.place(event), path)
        return Var(name, default, self.place(event))
