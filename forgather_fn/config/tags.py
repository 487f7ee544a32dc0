"""Tags: what they say, and what may follow them."""

import re
from typing import Final, Literal

import attrs

from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import IDENTIFIER, split_target
from forgather_fn.config.hints import nearest

CALLS: Final[dict[str, Literal["singleton", "factory", "partial", "meta"]]] = {
    "call": "singleton",
    "singleton": "singleton",
    "factory": "factory",
    "partial": "partial",
    "lambda": "partial",
    "meta": "meta",
}
"""The tags that call something, and the kind of node that each makes."""
LISTS: Final = ("list", "tuple")
MAPPINGS: Final = ("dict", "dlist")
SCALARS: Final = ("str", "int", "float", "bool", "null")
"""YAML's own, which turn a text into a value: ``!!str 1``."""

_TAG: Final = re.compile(r"!(?P<kind>\w+)(?::(?P<target>[^@]*))?(?:@(?P<name>.*))?", re.DOTALL)
_CORE: Final = "tag:yaml.org,2002:"


@attrs.frozen
class Tag:
    """A tag in its parts.

    Attributes:
        kind: A key of :data:`CALLS`, one of the others above, or ``var``.
        target: What is called.
        name: Given by ``@name``.
    """

    kind: str
    target: str = ""
    name: str | None = None


def tag_of(text: str) -> Tag | None:
    """Read a tag; None where it says nothing that a plain node does not.

    Raises:
        ConfigError: It is not one of those known here, or its target or name cannot be one.

    Example:
        >>> tag_of("!partial:torch.optim:AdamW@optimizer")
        Tag(kind='partial', target='torch.optim:AdamW', name='optimizer')
    """
    core = text.removeprefix(_CORE)
    if core in ("seq", "map"):
        return None
    if core in SCALARS:
        return Tag(core)
    known = (*CALLS, "var", *LISTS, *MAPPINGS)
    match = _TAG.fullmatch(text)
    if match is None or match["kind"] not in known:
        near = nearest(match["kind"], known) if match else None
        hint = f"did you mean !{near}?" if near else f"expected one of {', '.join('!' + one for one in known)}"
        raise ConfigError(f"unknown tag {text}: {hint}")
    tag = Tag(match["kind"], match["target"] or "", match["name"])
    if tag.name is not None and not IDENTIFIER.fullmatch(tag.name):
        raise ConfigError(f"{text}: {tag.name!r} is no name: expected letters, digits and _")
    if tag.kind in CALLS:
        split_target(tag.target)
    elif tag.target or (tag.kind == "var" and tag.name):
        raise ConfigError(f"{text}: expected !{tag.kind} alone, or with @name")
    return tag
