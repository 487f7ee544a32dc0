"""The arguments of a configuration by their paths: to list, compare, and replace them."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from forgather_fn.config.errors import ConfigError, Position
from forgather_fn.config.graph import Call, Graph, Items, Node, Pairs, Ref, Scalar, Var, graph_of
from forgather_fn.config.hints import nearest
from forgather_fn.config.parse import parse
from forgather_fn.config.redact import REDACTED
from forgather_fn.config.scalars import Value
from forgather_fn.config.secrets import is_secret
from forgather_fn.config.text import at

_STEP: Final = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def arguments(
    graph: Graph, target: str = "main", context: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Value]:
    """List the values that a target is made of, by their paths; what is called stands at the path of the call.

    Args:
        graph: Of the configuration.
        target: Whose.
        context: The values of variables, which are shown as text; secret ones are not shown.

    Example:
        >>> arguments(parse("main: !call:dict {lr: 1e-3, data: [!var x]}"), context={"x": "here"})
        {'main': '!call:dict', 'main.lr': 0.001, 'main.data[0]': 'here'}
    """
    return dict(_listed(graph, graph.targets[target], target, context)) if target in graph.targets else {}


def _listed(graph: Graph, ref: Ref, path: str, context: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    node = graph.nodes[ref]
    if isinstance(node, Scalar):
        yield path, node.value
    elif isinstance(node, Var):
        if node.variable in context:
            yield path, REDACTED if is_secret(node.variable) else _shown(context[node.variable])
        elif node.default is not None:
            yield from _listed(graph, node.default, path, context)
        else:
            yield path, f"!var {node.variable}"
    else:
        if isinstance(node, Call):
            yield path, f"!{'call' if node.kind == 'singleton' else node.kind}:{node.target}"
        elif not _steps(node):
            yield path, "[]" if isinstance(node, Items) or node.kind == "dlist" else "{}"
        for step, child in _steps(node).items():
            yield from _listed(graph, child, f"{path}{step}", context)


def _shown(value: Any) -> Value:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _steps(node: Node) -> dict[str, Ref]:
    """Name the steps from a node to those below it."""
    if isinstance(node, Items):
        return {f"[{i}]": ref for i, ref in enumerate(node.items)}
    if isinstance(node, Pairs):
        return {f".{key}": ref for key, ref in node.items}
    if isinstance(node, Call):
        args = {f"[{i}]": ref for i, ref in enumerate(node.args)}
        return {**args, **{f".{key}": ref for key, ref in node.kwargs}}
    return {}


def differences(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[tuple[str, str, str]]:
    """Compare the arguments of two configurations: path, old, new; a side that has none is ``-``."""
    paths = [*old, *(path for path in new if path not in old)]
    pairs = [(path, *(repr(side[path]) if path in side else "-" for side in (old, new))) for path in paths]
    return [(path, before, after) for path, before, after in pairs if before != after]


def replaced(graph: Graph, path: str, text: str) -> Graph:
    """Give a graph with another value at a path; an argument that a call does not have yet is added to it.

    Where several places share what the path leads through, it changes for all of them.

    Args:
        graph: Of the configuration.
        path: Such as ``main.optimizer.lr`` or ``main.layers[0]``.
        text: The value, as it would stand in a template.

    Raises:
        ConfigError: The path leads nowhere, or the value is not valid.
    """
    steps = [f".{name}" if name else f"[{number}]" for name, number in _STEP.findall(path)]
    if "".join(steps).removeprefix(".") != path or not steps or steps[0][1:] not in graph.targets:
        near = nearest(path, [path for name in graph.targets for path in arguments(graph, name)])
        hint = f"did you mean {near}?" if near else f"targets are {', '.join(graph.targets)}"
        raise ConfigError(f"{path} is no path to an argument: {hint}")
    given = _value(path, text)
    nodes = dict(enumerate(graph.nodes))
    offset = len(nodes)
    for ref, node in enumerate(given.nodes):
        nodes[offset + ref] = _moved(node, offset)
    new = offset + given.targets["x"]
    target = steps[0][1:]
    if len(steps) == 1:
        return graph_of(nodes, {**graph.targets, target: new})
    ref = graph.targets[target]
    for i, step in enumerate(steps[1:-1], 2):
        known = _steps(nodes[ref])
        if step not in known:
            raise _lost(path, "".join(steps[:i]), known)
        ref = known[step]
    nodes[ref] = _with(nodes[ref], steps[-1], new, path)
    return graph_of(nodes, graph.targets)


def _value(path: str, text: str) -> Graph:
    try:
        return parse(at(f"x: {text}", Position(f"{path}={text}")))
    except ConfigError as error:
        raise ConfigError(f"{path}={text}: {error.problem}") from None


def _with(node: Node, step: str, new: Ref, path: str) -> Node:
    known = _steps(node)
    if step not in known and not (isinstance(node, Call) and step.startswith(".")):
        raise _lost(path, path, known)
    if isinstance(node, Items):
        return attrs.evolve(node, items=tuple(new if f"[{i}]" == step else ref for i, ref in enumerate(node.items)))
    if isinstance(node, Pairs):
        return attrs.evolve(node, items=tuple((key, new if f".{key}" == step else ref) for key, ref in node.items))
    assert isinstance(node, Call)
    if step.startswith("["):
        return attrs.evolve(node, args=tuple(new if f"[{i}]" == step else ref for i, ref in enumerate(node.args)))
    return attrs.evolve(node, kwargs=tuple({**dict(node.kwargs), step[1:]: new}.items()))


def _lost(path: str, where: str, known: Mapping[str, Ref]) -> ConfigError:
    last = where.rpartition(".")[2]
    near = nearest(last, [step.lstrip(".") for step in known])
    hint = f"did you mean {near}?" if near else f"there are {', '.join(step.lstrip('.') for step in known) or 'none'}"
    return ConfigError(f"{path}: there is no {where.lstrip('.')}; {hint}")


def _moved(node: Node, offset: int) -> Node:
    if isinstance(node, Items):
        return attrs.evolve(node, items=tuple(ref + offset for ref in node.items))
    if isinstance(node, Pairs):
        return attrs.evolve(node, items=tuple((key, ref + offset) for key, ref in node.items))
    if isinstance(node, Call):
        kwargs = tuple((key, ref + offset) for key, ref in node.kwargs)
        return attrs.evolve(node, args=tuple(ref + offset for ref in node.args), kwargs=kwargs)
    if isinstance(node, Var) and node.default is not None:
        return attrs.evolve(node, default=node.default + offset)
    return node
