"""Values of a configuration that need no calls: what may be looked at before anything is trusted."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from forgather_fn.config.build import build, reached
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Call, Graph
from forgather_fn.config.parse import parse


def plain(graph: Graph, target: str, context: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Give a target that is made of plain values, lists and mappings only.

    Raises:
        ConfigError: There is no such target, or something in it is to be called.

    Example:
        >>> plain(parse("meta: {name: x, sizes: !tuple [1, 2]}"), "meta")
        {'name': 'x', 'sizes': (1, 2)}
    """
    if target in graph.targets:
        for ref in reached(graph, graph.targets[target]):
            node = graph.nodes[ref]
            if isinstance(node, Call):
                raise ConfigError(f"{target} takes plain values; it calls {node.target}", node.where, target)
    return build(graph, target, context)


def plain_text(name: str, text: str) -> Any:
    """Read a value that was given as text, as it would stand in YAML.

    Args:
        name: Of what it is for, for messages.
        text: The value.

    Raises:
        ConfigError: It is not valid, or has tags.
    """
    try:
        return plain(parse(f"x: {text}"), "x")
    except ConfigError as error:
        raise ConfigError(f"{name}={text}: {error.problem.replace('x takes', 'a variable takes')}") from None
