"""What a template that extends another says in vain: blocks that no other one has, and text between blocks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import attrs
from jinja2 import nodes

from forgather_fn.config.hints import nearest

_BRACKET: Final = re.compile(r"\s*\[\s*([A-Za-z_][\w-]*)\s*!?\s*\]?\s*([:;,.#].*)?$")
_MARKER: Final = re.compile(r"\s*(--|<<|>>|==|=>)([A-Za-z_'\"(].*)$")
_EXTENDS: Final = re.compile(r"\s*(--|<<|>>)extends\b")
_APART: Final = (nodes.Block, nodes.Macro, nodes.AssignBlock, nodes.CallBlock)
"""What has text of its own."""


@attrs.frozen
class Outline:
    """The blocks of a template.

    Attributes:
        blocks: Of each, its line in the file, and the block that it lies in, if any.
        called: The blocks that are called, as ``self.name()``.
        extends: Whether it extends another, be it under a condition.
    """

    blocks: Mapping[str, tuple[int, str | None]]
    called: frozenset[str]
    extends: bool


def outline_of(tree: nodes.Template, offset: int) -> Outline:
    """Find the blocks of a template, which begins behind so many lines of its file."""
    calls = (node for node in tree.find_all(nodes.Getattr) if isinstance(node.node, nodes.Name))
    called = frozenset(node.attr for node in calls if node.node.name == "self")  # type: ignore[attr-defined]
    return Outline(dict(_blocks(tree, None, offset)), called, tree.find(nodes.Extends) is not None)


def _blocks(node: nodes.Node, outer: str | None, offset: int) -> Iterator[tuple[str, tuple[int, str | None]]]:
    for child in node.iter_child_nodes():
        inner = outer
        if isinstance(child, nodes.Block):
            yield child.name, (child.lineno + offset, outer)
            inner = child.name
        yield from _blocks(child, inner, offset)


def in_vain(
    outlines: Mapping[str, Outline], parents: Mapping[str, Sequence[str]], *, ended: bool
) -> tuple[str, str, str] | None:
    """Find a block that nothing takes, as a block of this name is in no template that its own one extends.

    Args:
        outlines: Of each template.
        parents: What each has extended.
        ended: Whether the rendering has come to its end. Where it has not, only those count that had found all that
            they extend.

    Returns:
        The template, the block, and what is wrong; or None.
    """
    for template in parents:
        above = _above(template, parents)
        if not ended and any(one not in outlines or _is_halfway(one, outlines, parents) for one in above):
            continue
        known = {name: None for one in above for name in outlines[one].blocks}
        called = {name for one in (template, *above) for name in outlines[one].called}
        for name, (_, outer) in outlines[template].blocks.items():
            if outer is None and name not in known and name not in called:
                near = nearest(name, known)
                hint = (
                    f"did you mean [{near}]?"
                    if near
                    else f"there are {' '.join(f'[{one}]' for one in known) or 'none'}"
                )
                problem = f"no template that this one extends has a block [{name}]: {hint} ({', '.join(above)})"
                return template, name, problem
    return None


def _is_halfway(template: str, outlines: Mapping[str, Outline], parents: Mapping[str, Sequence[str]]) -> bool:
    return outlines[template].extends and template not in parents


def _above(template: str, parents: Mapping[str, Sequence[str]]) -> list[str]:
    """List what a template extends, and what that extends."""
    found: dict[str, None] = {}
    ahead = list(parents.get(template, ()))
    while ahead:
        one = ahead.pop(0)
        if one not in found:
            found[one] = None
            ahead.extend(parents.get(one, ()))
    return [*found]


def between(tree: nodes.Template, lines: Sequence[str]) -> int | None:
    """Find the first line between the blocks of a template that extends another, which has no place in the result."""
    ahead = iter(tree.body)
    if not any(isinstance(node, nodes.Extends) for node in ahead):  # what stands before that is written
        return None
    for output in _outputs(list(ahead)):
        for piece in output.nodes:
            text = piece.data if isinstance(piece, nodes.TemplateData) else "."
            for number, part in enumerate(text.split("\n"), piece.lineno):
                line = lines[number - 1] if number <= len(lines) else part
                if part.strip() and not line.lstrip().startswith("#"):
                    return number
    return None


def _outputs(found: Sequence[nodes.Node]) -> Iterator[nodes.Output]:
    for node in found:
        if isinstance(node, nodes.Output):
            yield node
        elif not isinstance(node, _APART):
            yield from _outputs(list(node.iter_child_nodes()))


def unread_extends(lines: Sequence[str]) -> int | None:
    """Find a line that was to say what a template extends, and lacks the blank behind its marker."""
    return next((number for number, line in enumerate(lines, 1) if _EXTENDS.match(line)), None)


def meant(line: str) -> str:
    r"""Guess what a line was meant to be that is almost a line statement; empty if it is nothing like one.

    Example:
        >>> meant("[model_args]:")
        '; a block begins with [model_args] alone on its line'
        >>> meant("--set x = 1")
        "; a marker is followed by a blank: '-- set x = 1'"
        >>> meant("a: [b]")
        ''
    """
    if found := _BRACKET.match(line):
        return f"; a block begins with [{found[1].replace('-', '_')}] alone on its line"
    if found := _MARKER.match(line):
        return f"; a marker is followed by a blank: {f'{found[1]} {found[2].strip()}'!r}"
    return ""
