"""What a recipe says of itself: the text of the call that made each of its parts."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import attrs

from forgather_fn.signature import bind

P = ParamSpec("P")
T = TypeVar("T")


@attrs.frozen(repr=False)
class Described:
    """A function that prints as the call that made it, and compares by that text."""

    function: Callable[..., Any] = attrs.field(eq=False)
    description: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return self.description


def described(factory: Callable[P, T]) -> Callable[P, T]:
    """Make what a factory returns print as the call that made it, defaults filled in.

    Arguments are held to what their annotations say (see :func:`~forgather_fn.signature.bind`). A closure becomes a
    :class:`Described`; a frozen record that has a field ``description`` gets that field set.

    Example:
        >>> @described
        ... def line(*, slope=2.0):
        ...     return lambda step: slope * step
        >>> line()
        line(slope=2.0)
        >>> line()(3)
        6.0
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = bind(factory, *args, **kwargs)
        made = cast(Callable[..., T], factory)(*bound.args, **bound.kwargs)
        text = f"{factory.__name__}({', '.join(_arguments(bound))})"
        kind: Any = type(made)
        if attrs.has(kind) and "description" in attrs.fields_dict(kind):
            return cast(T, attrs.evolve(cast(Any, made), description=text))
        return cast(T, Described(cast(Callable[..., Any], made), text))

    return make


def describe(part: object) -> str:
    """Name one part of a recipe: its description, a function's or class's qualified name, or its value."""
    if inspect.isfunction(part) or inspect.isclass(part) or inspect.isbuiltin(part):
        return f"{part.__module__}.{part.__qualname__}"
    if isinstance(part, functools.partial):
        given = [*map(describe, part.args), *(f"{name}={describe(value)}" for name, value in part.keywords.items())]
        return f"{describe(part.func)}({', '.join(given)})"
    if isinstance(part, list):
        return f"[{', '.join(map(describe, part))}]"
    if isinstance(part, tuple):
        return f"({', '.join(map(describe, part))}{',' * (len(part) == 1)})"
    if inspect.ismethod(part):
        return describe(part.__func__)
    description = getattr(part, "description", None)
    if isinstance(description, str) and description:
        return description
    return _unnamed(part) if type(part).__repr__ is object.__repr__ else repr(part)


def _unnamed(part: object) -> str:
    """Name an instance that does not say what it is by its class; its address means nothing in another process."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _arguments(bound: inspect.BoundArguments) -> list[str]:
    texts = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            texts += [describe(item) for item in value]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            texts += [f"{key}={describe(item)}" for key, item in value.items()]
        else:
            texts.append(f"{name}={describe(value)}")
    return texts
