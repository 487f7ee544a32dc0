"""Building: a graph to objects."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType, UnionType
from typing import Any, Final, Union, get_args, get_origin

import attrs

from forgather_fn.config.allow import check_allow, check_allowed, resolve
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Call, Graph, Items, Pairs, Ref, Scalar, Var, children
from forgather_fn.config.hints import nearest
from forgather_fn.config.walk import make

_KINDS: Final = {int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


def build(
    graph: Graph,
    target: str = "main",
    context: Mapping[str, Any] = MappingProxyType({}),
    *,
    allow: Collection[str] = (),
) -> Any:
    """Build a target of a configuration.

    The graph keeps nothing of it: building again gives new objects.

    Args:
        graph: What is to be built.
        target: Which of its targets.
        context: The values of its variables (``!var``).
        allow: Names beyond the registry that may be imported and called: ``"my_package.models:Model"``, or a whole
            package. It must come from whoever runs this, and never from the configuration.

    Raises:
        ConfigError: Something may not be called, is not there, or failed; where it stands is said. Before anything is
            imported, all that the target refers to is compared with what is allowed.

    Example:
        >>> from forgather_fn.config import parse
        >>> build(parse("main: !call:dict {a: !var x, b: [!var x]}"), context={"x": 1})
        {'a': 1, 'b': [1]}
    """
    if not isinstance(graph, Graph) or not isinstance(target, str) or not isinstance(context, Mapping):
        given = ", ".join(type(one).__name__ for one in (graph, target, context))
        raise ConfigError(f"build takes a graph, such as parse gives, a target's name and a mapping, got {given}")
    check_allow(allow)
    if target in graph.targets:
        _check_calls(graph, target, allow)
    return make(graph, target, _Builder(graph, context, allow))


def _check_calls(graph: Graph, target: str, allow: Collection[str]) -> None:
    refused: list[tuple[Call, str]] = []
    for node in (graph.nodes[ref] for ref in sorted(set(reached(graph, graph.targets[target])))):
        if isinstance(node, Call):
            try:
                check_allowed(node.target, allow)
            except ConfigError as error:
                refused.append((node, error.problem))
    if not refused:
        return
    node, problem = refused[0]
    others = sorted({one.target for one, _ in refused} - {node.target})
    more = f"\nand for others in it: {' '.join(f'--allow {one}' for one in others)}" if others else ""
    raise ConfigError(f"{problem}{more}", node.where)


def reached(graph: Graph, start: Ref) -> Iterator[Ref]:
    """Give a node, and all that it refers to, each once."""
    seen, waiting = {start}, [start]
    while waiting:
        ref = waiting.pop()
        yield ref
        new = [one for one in children(graph.nodes[ref]) if one not in seen]
        seen.update(new)
        waiting += new


def _numbers(function: Any) -> dict[str, str]:
    """Tell, of the parameters that are annotated as numbers and nothing else, what they expect."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except Exception:  # it has no signature, or its annotations name what is not there
        return {}
    found = {}
    for name, parameter in parameters.items():
        annotation = parameter.annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        if all(isinstance(one, type) and one in _KINDS for one in kinds):
            found[name] = " or ".join(_KINDS[one] for one in kinds)
    return found


@attrs.frozen(eq=False)
class _Builder:
    """Makes objects of nodes."""

    graph: Graph
    context: Mapping[str, Any]
    allow: Collection[str]

    def scalar(self, node: Scalar) -> Any:
        return node.value

    def items(self, node: Items, items: Sequence[Any]) -> Any:
        return tuple(items) if node.kind == "tuple" else list(items)

    def pairs(self, node: Pairs, values: Sequence[Any]) -> Any:
        keys = [key for key, _ in node.items]
        return list(values) if node.kind == "dlist" else dict(zip(keys, values, strict=True))

    def variable(self, node: Var, default: Callable[[], Any] | None) -> Any:
        if node.variable in self.context:
            return self.context[node.variable]
        if default is not None:
            return default()
        near = nearest(node.variable, self.context)
        known = f"did you mean {near!r}?" if near else f"known are {', '.join(self.context) or 'none'}"
        raise ConfigError(f"variable {node.variable!r} has no value and no default; {known}", node.where)

    def call(self, node: Call, args: Sequence[Any], kwargs: Sequence[tuple[str, Any]], key: str) -> Any:
        function = self._resolved(node, key)
        named = {name: value for name, value in kwargs if name != "submodule_searchpath" or ".py:" not in node.target}
        self._check_names(function, node, named, key)
        self._check_numbers(function, node, named, key)
        if node.kind == "partial":
            return functools.partial(function, *args, **named) if args or named else function
        try:
            return function(*args, **named)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{node.target} failed: {type(error).__name__}: {error}", node.where, key) from error

    def meta(self, node: Call, args: Sequence[Graph], kwargs: Sequence[tuple[str, Graph]], key: str) -> Any:
        return self.call(attrs.evolve(node, kind="singleton"), args, kwargs, key)

    def _check_names(self, function: Any, node: Call, named: Mapping[str, Any], key: str) -> None:
        """Refuse an argument that the function does not have, where that can be known, at the argument's place."""
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return
        kinds = [parameter.kind for parameter in parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return
        for name in named:
            if name not in parameters:
                near = nearest(name, parameters)
                hint = f"did you mean {near}?" if near else f"it has {', '.join(parameters) or 'none'}"
                where = self.graph.nodes[dict(node.kwargs)[name]].where
                raise ConfigError(f"{node.target} has no argument {name}: {hint}", where, f"{key}.{name}")

    def _check_numbers(self, function: Any, node: Call, named: Mapping[str, Any], key: str) -> None:
        """Refuse text, or a collection, for an argument that is a number, at the argument's place."""
        for name, expected in _numbers(function).items():
            if isinstance(value := named.get(name), str | list | tuple | dict):
                where = self.graph.nodes[dict(node.kwargs)[name]].where
                raise ConfigError(f"{node.target}: {name}={value!r}: expected {expected}", where, f"{key}.{name}")

    def _resolved(self, node: Call, key: str) -> Any:
        try:
            return resolve(node.target, self.allow)
        except ConfigError as error:
            raise ConfigError(error.problem, node.where, key) from error.__cause__
