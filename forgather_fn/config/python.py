"""Writing a graph as Python source: the same walk as building, with statements for what it would do."""

import builtins
import keyword
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import attrs

from forgather_fn.config.builtin import BUILTINS
from forgather_fn.config.dump import dump
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import IDENTIFIER, Call, Graph, Items, Pairs, Scalar, Var, split_target
from forgather_fn.config.walk import make

_OWN: Final = "forgather_fn.config.builtin"
_PARTIAL: Final = ("functools", "partial")
_PARSE: Final = ("forgather_fn.config", "parse")
_RESOLVE: Final = ("forgather_fn.config.allow", "resolve")
_FIXED: Final = frozenset({"Any", "context", "str"}) | {name for name in BUILTINS if name in dir(builtins)}
"""What code refers to by names that cannot be changed."""
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
    aliases = _aliases(graph)
    reserved = _FIXED | set(aliases.values())
    functions = []
    for target in graph.targets if targets is None else targets:
        if _name(target, "a target") in _FIXED:
            raise ConfigError(f"target {target!r} has the name of something that its code calls: rename it")
        writer = _Writer(aliases, reserved)
        result = make(graph, target, writer)
        body = "".join(f"    {line}\n" for line in writer.lines)
        functions.append(f"def {target}(**context: Any) -> Any:\n{body}    return {result}\n")
    source = "\n\n\n".join(functions)
    imported = [_import(place, alias) for place, alias in aliases.items() if re.search(rf"\b{alias}\b", source)]
    return "\n\n\n".join(["\n".join([_HEAD, *sorted(imported), "from typing import Any"]), *functions])


def _aliases(graph: Graph) -> dict[tuple[str, str], str]:
    """Choose a name for whatever the code imports: its own, or with a number where that is taken."""
    places = [_PARTIAL, _PARSE, _RESOLVE]
    for node in graph.nodes:
        if isinstance(node, Call):
            module, name = _place(node.target)
            if module != "builtins" and not module.endswith(".py"):
                places.append((module, name.partition(".")[0]))
    taken = _FIXED | set(graph.targets)
    found: dict[tuple[str, str], str] = {}
    for place in dict.fromkeys(places):
        alias, number = place[1], 2
        while alias in taken:
            alias, number = f"{place[1]}_{number}", number + 1
        taken |= {alias}
        found[place] = alias
    return found


def _import(place: tuple[str, str], alias: str) -> str:
    module, name = place
    for part in (*module.split("."), name):
        _name(part, f"a part of '{module}:{name}'")
    return f"from {module} import {name}{f' as {alias}' if alias != name else ''}"


def _place(target: str) -> tuple[str, str]:
    """Tell in which module code finds what a configuration calls, and under which name."""
    module, name = split_target(target)
    if module is not None or name not in BUILTINS:
        return module or "builtins", name
    function: Any = BUILTINS[name]
    if function.__module__ == _OWN:
        return _OWN, function.__name__
    if function.__module__ == "_operator":
        return "operator", function.__name__
    return "builtins", name


def _name(text: str, what: str) -> str:
    if not IDENTIFIER.fullmatch(text) or keyword.iskeyword(text):
        raise ConfigError(f"{text!r} is {what}, but no Python identifier, so that no code can be written for it")
    return text


@attrs.frozen(eq=False)
class _Writer:
    """Makes an expression of each node; calls become statements, in their order, and their value a name."""

    aliases: Mapping[tuple[str, str], str]
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
            return self._assigned(f"{self.aliases[_PARTIAL]}({', '.join([function, *given])})", node)
        return self._assigned(f"{function}({', '.join(given)})", node)

    def meta(self, node: Call, args: Sequence[Graph], kwargs: Sequence[tuple[str, Graph]], key: str) -> str:
        parse = self.aliases[_PARSE]
        texts = [f"{parse}({dump(graph)!r})" for graph in args]
        named = [(name, f"{parse}({dump(graph)!r})") for name, graph in kwargs]
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
        module, name = _place(target)
        if module.endswith(".py"):
            return f"{self.aliases[_RESOLVE]}({target!r}, [{target!r}])"
        first, *rest = (_name(part, f"a part of {target!r}") for part in name.split("."))
        return ".".join([first if module == "builtins" else self.aliases[module, first], *rest])


def _is_plain(name: str) -> bool:
    return bool(IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name)
