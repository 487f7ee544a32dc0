"""What the annotations of a call promise, held to when it is made.

A recipe is made of many small calls, some of them written in a configuration, where ``"1e-3"`` is a text and ``yes`` a
truth. What is of the wrong type would fail steps later, in an operation on tensors, or not at all: every text is true.
"""

import contextlib
import difflib
import functools
import inspect
import os
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import attrs
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


@attrs.frozen
class Expected:
    """What one parameter takes: a test, and its name in an error."""

    takes: Callable[[Any], bool]
    text: str
    known: tuple[str, ...] = ()

    def refusal(self, name: str, given: Any) -> str:
        """Say what is wrong; of known texts the one first that is most like what was given."""
        if self.known and isinstance(given, str):
            near = difflib.get_close_matches(given, self.known, n=len(self.known), cutoff=0.0)
            return f"{name}={shown(given)} is not one of {', '.join(map(repr, near))}"
        why = getattr(given, "misplaced", "")
        return f"{name} must be {self.text}; got {shown(given)}" + (f": {why}" if why else "")


_LARGEST: Final = int(sys.float_info.max)

_ANYTHING: Final = Expected(lambda value: True, "anything")

_NUMBERS: Final[Mapping[Any, Expected]] = {
    bool: Expected(lambda value: type(value) is bool, "True or False"),
    int: Expected(lambda value: type(value) is int and -(2**63) <= value < 2**63, "an integer"),
    float: Expected(lambda value: type(value) is float or (type(value) is int and abs(value) <= _LARGEST), "a number"),
    str: Expected(lambda value: isinstance(value, str), "a text"),
    type(None): Expected(lambda value: value is None, "None"),
}


def checked(factory: Callable[P, T]) -> Callable[P, T]:
    """Hold the arguments of a function to what their annotations say; see :func:`bind`."""

    @functools.wraps(factory)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = bind(factory, *args, **kwargs)
        return cast(Callable[..., T], factory)(*bound.args, **bound.kwargs)

    return call


def bind(factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Bind the arguments of a call, defaults filled in, numpy's numbers made Python's.

    Checked are parameters whose annotations are made of numbers, truths, texts, None, functions, and tuples, sequences
    and mappings of those. What a parameter of another type takes, and which numbers and texts, is for the function to
    say.

    Raises:
        ValueError: An argument is not of the type that its annotation says.
        TypeError: There is no such parameter, or one is missing.

    Example:
        >>> def halved(rate: float, *, steps: int = 1, mode: Literal["up", "down"] = "up"): ...
        >>> bind(halved, np.float32(0.5)).arguments
        {'rate': 0.5, 'steps': 1, 'mode': 'up'}
        >>> bind(halved, "0.5")
        Traceback (most recent call last):
        ValueError: halved: rate must be a number; got '0.5'
    """
    signature, expected = _signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise _wrong_call(factory.__name__, signature, args, kwargs, error) from None
    bound.apply_defaults()
    for name, one in expected.items():
        bound.arguments[name] = value = plain(bound.arguments[name])
        if not one.takes(value):
            raise ValueError(f"{factory.__name__}: {one.refusal(name, value)}")
    return bound


def checked_fields(cls: type[T]) -> type[T]:
    """Let a record that takes its fields by name say which there are, where an argument is none of them.

    Example:
        >>> @checked_fields
        ... @attrs.frozen(kw_only=True)
        ... class Recipe:
        ...     rate: float
        >>> Recipe(rate=1.0, lr=1.0)
        Traceback (most recent call last):
        TypeError: Recipe: got an unexpected keyword argument 'lr'; it takes rate, each by its name; the learning ...
    """
    init, signature = cls.__init__, inspect.signature(cls)

    @functools.wraps(init)
    def filled(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _wrong_call(cls.__name__, signature, args, kwargs, error) from None
        init(self, *args, **kwargs)

    cls.__init__ = filled  # type: ignore[method-assign]
    return cls


def plain(value: Any) -> Any:
    """Make Python's numbers of numpy's, which print otherwise; a recipe is compared by its text."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def shown(value: object) -> str:
    """Print what was given, shortened where it is long."""
    return reprlib.repr(value)


def _wrong_call(
    name: str, signature: inspect.Signature, args: Sequence[Any], given: Mapping[str, Any], error: TypeError
) -> TypeError:
    """Say what there is to be given, and where that is which people look for here."""
    text = f"{name}: {error}; it takes {_known(signature, given)}"
    if {"lr", "learning_rate"} & {*given}:
        text += "; the learning rate is " + ("peak" if "peak" in signature.parameters else _RATE)
    elif args and "weight_decay" in signature.parameters:
        text += f"; the learning rate is {_RATE}, and parameters are those of its model"
    return TypeError(text)


_RATE: Final = "the plan's: Plan(schedule=1e-3)"


def _known(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """List the names of parameters, those first that are like a name that is none of them."""
    names = list(signature.parameters)
    unknown = next((name for name in given if name not in names), "")
    near = difflib.get_close_matches(unknown, names, n=len(names), cutoff=0.0) if unknown else names
    named = names and all(one.kind is one.KEYWORD_ONLY for one in signature.parameters.values())
    return (", ".join(near) or "none") + ", each by its name" * bool(named)


@functools.cache
def _signature(factory: Callable[..., Any]) -> tuple[inspect.Signature, Mapping[str, Expected]]:
    signature, hints = inspect.signature(factory), _hints(factory)
    single = (p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    found = {name: expected(hints[name]) for name in single if hints.get(name, Any) is not Any}
    return signature, {name: one for name, one in found.items() if one is not None}


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Read annotations; those that name what is imported for type checking alone are left out."""
    found: dict[str, Any] = {}
    names = getattr(inspect.unwrap(factory), "__globals__", {})
    for name, hint in inspect.get_annotations(factory).items():
        alone = types.SimpleNamespace(__annotations__={name: hint})
        with contextlib.suppress(NameError):
            found |= get_type_hints(alone, names)
    return found


def expected(hint: Any) -> Expected | None:
    """Read an annotation; None where it is made of other types."""
    origin = get_origin(hint)
    if hint in _NUMBERS:
        return _NUMBERS[hint]
    if hint is Any:
        return _ANYTHING
    if origin is Literal:
        names = get_args(hint)
        return Expected(
            lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}", names
        )
    if origin in (Union, types.UnionType):
        return _any_of(list(map(expected, get_args(hint))))
    if origin is Callable:
        return Expected(callable, "a function")
    if getattr(hint, "_is_protocol", False) and "__call__" in vars(hint):
        return Expected(callable, f"a function ({hint.__name__})")
    if hint is Path or origin is os.PathLike:
        return Expected(lambda value: isinstance(value, os.PathLike), "a path")
    inner = [expected(one) for one in get_args(hint) if one is not Ellipsis]
    known = [one for one in inner if one is not None]
    return _container(origin, known) if known and len(known) == len(inner) else None


def _iterates(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # also of arrays without a dimension, which have the method
        return False
    return not isinstance(value, str | bytes)


def _any_of(members: Sequence[Expected | None]) -> Expected | None:
    known = [one for one in members if one is not None]
    if len(known) < len(members):
        return None
    texts = dict.fromkeys(one.text for one in known)
    names = tuple(name for one in known for name in one.known)
    return Expected(lambda value: any(one.takes(value) for one in known), " or ".join(texts), names)


def _container(origin: Any, inner: Sequence[Expected]) -> Expected | None:
    """Read the annotation of what has others in it; how many there must be is for the function to say."""
    first, last = inner[0], inner[-1]

    def pairs(value: Any) -> bool:
        return isinstance(value, tuple | list) and all(map(lambda one, item: one.takes(item), inner, value))

    def items(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(first.takes, value))

    def entries(value: Any) -> bool:
        return isinstance(value, Mapping) and all(first.takes(key) and last.takes(value[key]) for key in value)

    if origin is tuple:
        return Expected(pairs, f"({', '.join(one.text for one in inner)})")
    if origin is Sequence:
        return Expected(items, f"a sequence, each {first.text}")
    if origin is Iterable:  # of what may be read once only
        return Expected(_iterates, "something to iterate over" if first is _ANYTHING else f"several, each {first.text}")
    return Expected(entries, f"a mapping of {first.text} to {last.text}") if origin is Mapping else None
