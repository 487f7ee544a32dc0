"""Dynamic arguments: what a configuration declares becomes options of the command line."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.config.emit import inline
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Graph
from forgather_fn.config.plain import plain
from forgather_fn.config.scalars import Value
from forgather_fn.terminal import printable

TARGET: Final = "dynamic_args"


def _bool(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _path(text: str) -> str:
    return str(Path(text))


_TYPES: Final[Mapping[str, Callable[[str], Value]]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": _bool,
    "path": _path,
}
_KNOWN: Final = frozenset({"names", "type", "help", "default", "choices", "argument"})


@attrs.frozen(kw_only=True)
class Dynamic:
    """One option that a configuration declares.

    Attributes:
        variable: Its name.
        flags: As they are typed.
        type: What the text is turned into.
        help: In words.
        default: Where the option is not given; None leaves it to the configuration.
        choices: What it may be.
        argument: The path of the argument that it sets; None sets the variable.
    """

    variable: str
    flags: tuple[str, ...]
    type: str = "str"
    help: str = ""
    default: Value = None
    choices: tuple[Value, ...] | None = None
    argument: str | None = None

    @property
    def name(self) -> str:
        """What is set: a variable's name, or an argument's path."""
        return self.argument or self.variable


def declared(graph: Graph) -> list[Dynamic]:
    """Read the options that a configuration declares under ``dynamic_args``.

    Raises:
        ConfigError: A declaration is not one.
    """
    if TARGET not in graph.targets:
        return []
    given = plain(graph, TARGET)
    if not isinstance(given, dict):
        raise ConfigError(f"{TARGET}: expected a mapping of names, got {given!r}")
    return [_declaration(str(name), spec or {}) for name, spec in given.items()]


def _declaration(name: str, spec: Any) -> Dynamic:
    where = f"{TARGET}.{name}"
    if not isinstance(spec, dict) or set(spec) - _KNOWN:
        raise ConfigError(f"{where}: expected some of {', '.join(sorted(_KNOWN))}, got {spec!r}")
    names = spec.get("names") or f"--{name.replace('_', '-')}"
    flags = tuple([names] if isinstance(names, str) else map(str, names))
    if not all(flag.startswith("-") and flag.isprintable() for flag in flags):
        raise ConfigError(f"{where}: {', '.join(flags)}: an option begins with '-', and can be printed")
    kind = str(spec.get("type") or "str")
    if kind not in _TYPES:
        raise ConfigError(f"{where}: type {kind!r} is none of {', '.join(_TYPES)}")
    choices = spec.get("choices")
    return Dynamic(
        variable=name,
        flags=flags,
        type=kind,
        help=str(spec.get("help") or ""),
        default=spec.get("default"),
        choices=tuple(choices) if choices else None,
        argument=spec.get("argument"),
    )


def add_options(parser: argparse.ArgumentParser, options: list[Dynamic]) -> None:
    """Add them to a parser.

    Raises:
        ConfigError: One has the name of an option that is there already.
    """
    group = parser.add_argument_group("options of the configuration")
    for one in options:
        try:
            group.add_argument(
                *one.flags,
                dest=f"dynamic:{one.variable}",
                type=_TYPES[one.type],
                choices=one.choices,
                default=None,
                metavar=None if one.choices else one.type.upper(),
                help=printable(one.help).replace("%", "%%"),
            )
        except argparse.ArgumentError as error:
            raise ConfigError(f"{TARGET}.{one.variable}: {error}") from None


def settings_of(options: argparse.Namespace, declared: list[Dynamic]) -> dict[str, str]:
    """Give, as text, what was set by them."""
    found: dict[str, str] = {}
    for one in declared:
        value = getattr(options, f"dynamic:{one.variable}")
        value = one.default if value is None else value
        if value is not None:
            found[one.name] = inline(value)
    return found
