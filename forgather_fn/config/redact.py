"""Taking secrets out of what is written down."""

import re
from collections.abc import Collection, Iterable
from typing import Final

import attrs

from forgather_fn.config.graph import Call, Graph, Node, Pairs, Ref, Scalar, Var, children, graph_of
from forgather_fn.config.secrets import is_secret

REDACTED: Final = "<redacted>"
"""What stands for a secret."""

_SHORT: Final = 4
"""Secrets of fewer characters are taken out where their name stands, and not wherever the same characters do."""
_NAMED: Final = re.compile(
    r"""(?P<head>(?<![\w.-])["']?(?P<name>[\w.-]+)["']?[ \t]*[:=][ \t]*(?:[&!]\S+[ \t]+)*)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s,}\]\)\#|>&!*{][^\s,}\]\)]*)"""
)
_EMPTY: Final = frozenset({"null", "~", "true", "false", "none", "None", '""', "''", REDACTED})


def secrets_in(graph: Graph) -> frozenset[str]:
    """Collect the values that stand under secret names."""
    found: set[str] = set()
    for ref in _secret_refs(graph):
        waiting = [ref]
        while waiting:
            node = graph.nodes[waiting.pop()]
            if isinstance(node, Scalar) and not (node.value is None or isinstance(node.value, bool)):
                found.add(str(node.value))
            waiting += children(node)
    return frozenset(found - {"", REDACTED})


def _secret_refs(graph: Graph) -> Iterable[Ref]:
    for name, ref in graph.targets.items():
        if is_secret(name):
            yield ref
    for node in graph.nodes:
        if isinstance(node, Var) and node.default is not None and is_secret(node.variable):
            yield node.default
        pairs = node.items if isinstance(node, Pairs) else node.kwargs if isinstance(node, Call) else ()
        yield from (ref for key, ref in pairs if isinstance(key, str) and is_secret(key))


def redacted_graph(graph: Graph, secrets: Collection[str]) -> Graph:
    """Put :data:`REDACTED` in the place of secrets: those under secret names, and those values anywhere."""
    named = set(_below(graph, _secret_refs(graph)))
    nodes: dict[Ref, Node] = {}
    for ref, node in enumerate(graph.nodes):
        nodes[ref] = node
        if isinstance(node, Scalar) and not (node.value is None or isinstance(node.value, bool)):
            if ref in named:
                nodes[ref] = attrs.evolve(node, value=REDACTED)
            elif isinstance(node.value, str):
                nodes[ref] = attrs.evolve(node, value=without(node.value, secrets))
    return graph_of(nodes, graph.targets)


def _below(graph: Graph, refs: Iterable[Ref]) -> Iterable[Ref]:
    waiting = list(refs)
    seen: set[Ref] = set()
    while waiting:
        ref = waiting.pop()
        if ref not in seen:
            seen.add(ref)
            yield ref
            waiting += children(graph.nodes[ref])


def without(text: str, secrets: Collection[str]) -> str:
    """Take values out of a text, wherever they stand."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORT:
            text = text.replace(secret, REDACTED)
    return text


def redacted_text(text: str, secrets: Collection[str]) -> str:
    """Take secrets out of a text: those values, and what stands after a secret name and ``:`` or ``=``.

    Example:
        >>> redacted_text("hf_token: abc, lr: 1  # say sesame", ["sesame"])
        'hf_token: <redacted>, lr: 1  # say <redacted>'
    """

    def replace(match: re.Match[str]) -> str:
        if not is_secret(match["name"]) or match["value"] in _EMPTY:
            return match[0]
        return f"{match['head']}{REDACTED}"

    return _NAMED.sub(replace, without(text, secrets))


def redacted_command(command: Collection[str], secrets: Collection[str]) -> list[str]:
    """Take secrets out of the arguments of a command: also what follows an option with a secret name."""
    found: list[str] = []
    after_secret = False
    for argument in command:
        name = argument.lstrip("-").replace("-", "_")
        found.append(REDACTED if after_secret else redacted_text(argument, secrets))
        after_secret = argument.startswith("--") and "=" not in argument and is_secret(name)
    return found
