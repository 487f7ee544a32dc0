"""Writing a graph as Python source: the same walk as building, with statements for what it would do."""

import keyword
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import attrs

from forgather_fn.config.builtin import BUILTINS
from forgather_fn.config.dump import dump
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import IDENTIFIER, Call, Graph, Items, Pairs, Scalar, Var, parts_of
from forgather_fn.config.walk import make

_OWN: Final = "forgather_fn.config.builtin"
_NUMBERED: Final = re.compile(r"v\d+")
_HEAD: Final = "# Made from a configuration by forgather_fn.config.to_python."


def to_python(graph: Graph, targets: Collection[str] | None = None) -> str:
    """Write targets as a Python module: for each a function of its name, whose arguments are the graph's variables.

    Calling it builds what :func:`~forgather_fn.config.build.build` builds, call by call in the same order. (Where a
    variable is given, calls in its default are made all the same.) The source imports what the graph names: read it
    before running it.

    Args:
        graph: What is to be built.
        targets: Which; None for all.

    Raises:
        ConfigError: A name in it is no identifier, or a call takes graphs (``!meta``) in an argument by position only.

    Example:
        >>> from forgather_fn.config import parse
        >>> print(to_python(parse("main: !call:dict {a: !var x}")))
        # Made from a configuration by forgather_fn.config.to_python.
        from typing import Any
        <BLANKLINE>
        <BLANKLINE>
        def main(**context: Any) -> Any:
            v1 = dict(a=context['x'])
            return v1
        <BLANKLINE>
    """
    imports: set[str] = set()
    reserved = _reserved(graph)
    functions = []
    for target in graph.targets if targets is None else targets:
        if _name(target, "a target") in reserved:
            raise ConfigError(f"target {target!r} has the name of something that its code calls: rename it")
        writer = _Writer(imports, reserved)
        result = make(graph, target, writer)
        body = "".join(f"    {line}\n" for line in writer.lines)
        functions.append(f"def {target}(**context: Any) -> Any:\n{body}    return {result}\n")
    lines = [_HEAD, *(f"import {module}" for module in sorted(imports)), "from typing import Any"]
    return "\n\n\n".join(["\n".join(lines), *functions])


def _reserved(graph: Graph) -> frozenset[str]:
    """Name what the code refers to: nothing in it may have these names."""
    modules = {parts_of(node.target)[0] or "builtins" for node in graph.nodes if isinstance(node, Call)}
    fixed = {"Any", "builtins", "context", "float", "forgather_fn", "functools", "operator", "str", *BUILTINS}
    return frozenset({module.partition(".")[0] for module in modules} | fixed)


def _name(text: str, what: str) -> str:
    if not IDENTIFIER.fullmatch(text) or keyword.iskeyword(text):
        raise ConfigError(f"{text!r} is {what}, but no Python identifier, so that no code can be written for it")
    return text


@attrs.frozen(eq=False)
class _Writer:
    """Makes an expression of each node; calls become statements, in their order, and their value a name."""

    imports: set[str]
    reserved: frozenset[str]
    lines: list[str] = attrs.field(factory=list)

    def scalar(self, node: Scalar) -> str:
        text = repr(node.value)
        return f"float({text!r})" if isinstance(node.value, float) and text.strip("-") in ("inf", "nan") else text

    def items(self, node: Items, items: Sequence[str]) -> str:
        inside = ", ".join(items)
        return self._assigned(f"({inside}{',' * (len(items) == 1)})" if node.kind == "tuple" else f"[{inside}]", node)

    def pairs(self, node: Pairs, values: Sequence[str]) -> str:
        if node.kind == "dlist":
            return self._assigned(f"[{', '.join(values)}]", node)
        keys = [self.scalar(Scalar(key)) for key, _ in node.items]
        inside = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
        return self._assigned(f"{{{inside}}}", node)

    def variable(self, node: Var, default: Callable[[], str] | None) -> str:
        name = repr(node.variable)
        if default is None:
            return f"context[{name}]"
        return self._assigned(f"context[{name}] if {name} in context else {default()}", node)

    def call(self, node: Call, args: Sequence[str], kwargs: Sequence[tuple[str, str]], key: str) -> str:
        del key
        function = self._function(node.target)
        plain = [f"{name}={value}" for name, value in kwargs if _is_plain(name)]
        odd = ", ".join(f"{name!r}: {value}" for name, value in kwargs if not _is_plain(name))
        given = [*args, *plain, *([f"**{{{odd}}}"] if odd else [])]
        if node.kind == "partial":
            if not given:
                return function  # as in building
            self.imports.add("functools")
            return self._assigned(f"functools.partial({', '.join([function, *given])})", node)
        return self._assigned(f"{function}({', '.join(given)})", node)

    def meta(self, node: Call, args: Sequence[Graph], kwargs: Sequence[tuple[str, Graph]], key: str) -> str:
        self.imports.add("forgather_fn.config")
        texts = [f"forgather_fn.config.parse({dump(graph)!r})" for graph in args]
        named = [(name, f"forgather_fn.config.parse({dump(graph)!r})") for name, graph in kwargs]
        return self.call(attrs.evolve(node, kind="singleton"), texts, named, key)

    def _assigned(self, expression: str, node: Items | Pairs | Call | Var) -> str:
        name = f"v{len(self.lines) + 1}"
        if (
            isinstance(node, Items | Pairs | Call)
            and node.name
            and not (isinstance(node, Call) and node.kind == "factory")
        ):
            name = _name(node.name, "a name")
            while name in self.reserved or _NUMBERED.fullmatch(name):
                name += "_"
        self.lines.append(f"{name} = {expression}")
        return name

    def _function(self, target: str) -> str:
        module, name = parts_of(target)
        if module is None and name in BUILTINS:
            module, name = _home(BUILTINS[name], name)
        elif module is not None and module.endswith(".py"):
            self.imports.add("forgather_fn.config.allow")
            return f"forgather_fn.config.allow.resolve({target!r}, allow=[{target!r}])"
        for part in [*(module or "builtins").split("."), *name.split(".")]:
            _name(part, f"a part of {target!r}")
        if module == "builtins":
            return name
        self.imports.add(module or "builtins")
        return f"{module or 'builtins'}.{name}"


def _home(function: Any, name: str) -> tuple[str, str]:
    """Tell where code finds what a configuration calls by a bare name."""
    if function.__module__ == _OWN:
        return _OWN, function.__name__
    if function.__module__ == "_operator":
        return "operator", function.__name__
    return "builtins", name


def _is_plain(name: str) -> bool:
    return bool(IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name)
