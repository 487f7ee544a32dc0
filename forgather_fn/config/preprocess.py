"""Line statements: the short forms that a template is written in, turned into Jinja's, line by line.

    -- statement     {% statement %}               << and >> trim the white space before and after it
    == expression    {{ expression }}              => trims line ends of the value
    ## comment       removed; so is a tail of a line that begins with a blank and ##, outside quotes
    [name]           {% block name %}, closed before the next [block] that is not deeper, or at the end;
                     [name!] trims the block's text

A marker is followed by a blank. One line stays one line, so that line numbers hold.
"""

import re
from collections.abc import Callable, Iterator
from typing import Final

import attrs

_STATEMENT: Final = re.compile(r"\s*(--|<<|>>|==|=>)\s+(.*)$")
_BLOCK: Final = re.compile(r"(\s*)\[([A-Za-z_]\w*)(!?)\]\s*$")
_COMMENT: Final = re.compile(r"\s*##")
_FORMS: Final = {
    "--": "{{% {} %}}",
    "<<": "{{%- {} %}}",
    ">>": "{{% {} -%}}",
    "==": "{{{{ {} }}}}",
    "=>": r"{{{{ ({})|trim('\n') }}}}",
}
_OPENING: Final = frozenset({"autoescape", "block", "call", "filter", "for", "if", "macro", "with"})


@attrs.frozen
class _Open:
    """Something that is open: a bracket block, at its indent, or a statement, which ends by its own ``end...``."""

    keyword: str
    indent: int | None
    close: str


def preprocess(source: str) -> str:
    r"""Turn line statements into Jinja's. A pure function; the result has as many lines, but for what closes blocks.

    Example:
        >>> preprocess("-- set x = 1\na: == x\n== x  ## twice")
        '{% set x = 1 %}\na: == x\n{{ x }}'
        >>> preprocess("[a]\nx: 1")
        '{% block a %}\nx: 1\n{% endblock a %}'
    """
    opened: list[_Open] = []
    lines = [_line(line, opened) for line in source.split("\n")]
    closing = "".join(reversed([one.close for one in opened if one.indent is not None]))
    if closing and lines[-1]:
        lines.append(closing)
    else:
        lines[-1] += closing
    return "\n".join(lines)


def _line(line: str, opened: list[_Open]) -> str:
    if _COMMENT.match(line):
        return "{##}"
    line = without_tail(line)
    if block := _BLOCK.match(line):
        return _block(len(block[1].expandtabs()), block[2], bool(block[3]), opened)
    if statement := _STATEMENT.match(line.rstrip()):
        marker, body = statement.groups()
        before = _track(body, opened) if marker in ("--", "<<", ">>") else ""
        return before + _FORMS[marker].format(body)
    return line


def _block(indent: int, name: str, trimmed: bool, opened: list[_Open]) -> str:
    before = "".join(_closed(opened, lambda one: one.indent is not None and one.indent >= indent))
    opening, close = f"{{% block {name} %}}", f"{{% endblock {name} %}}"
    if trimmed:
        opening, close = f"{opening}{{% filter trim %}}", f"{{% endfilter %}}{close}"
    opened.append(_Open("block", indent, close))
    return before + opening


def _track(body: str, opened: list[_Open]) -> str:
    """Note what a statement opens, or close the bracket blocks inside of what it ends."""
    keyword = body.split(maxsplit=1)[0] if body else ""
    if keyword in _OPENING or (keyword == "set" and re.match(r"set\s+[\w.]+\s*(\||$)", body)):
        opened.append(_Open(keyword, None, ""))
    elif keyword.startswith("end"):
        ended = keyword.removeprefix("end")
        if any(one.indent is None and one.keyword == ended for one in opened):
            before = "".join(_closed(opened, lambda one: one.indent is not None or one.keyword != ended))
            opened.pop()
            return before
    return ""


def _closed(opened: list[_Open], inside: Callable[[_Open], bool]) -> Iterator[str]:
    while opened and inside(opened[-1]):
        yield opened.pop().close


def without_tail(line: str) -> str:
    r"""Cut the comment at the end of a line. A quotation that ends on the line keeps what is in it.

    Example:
        >>> without_tail("a: 1 ## one"), without_tail("a: 'x ## y' ## z"), without_tail("a: don't ## y")
        ('a: 1', "a: 'x ## y'", "a: don't")
    """
    at = 0
    while at < len(line):
        if line[at] in "'\"" and (at == 0 or line[at - 1] in " \t[{(,:=~|+-*/<>!&?"):
            at = _end_of_quotation(line, at)
        elif line.startswith("##", at) and at and line[at - 1].isspace():
            return line[:at].rstrip()
        at += 1
    return line


def _end_of_quotation(line: str, start: int) -> int:
    """Give the place of the closing quote, or the opening one's where there is none: then it is a character."""
    quote, at = line[start], start + 1
    while at < len(line):
        if line[at] == "\\" and quote == '"':
            at += 1
        elif line[at] == quote:
            if quote == "'" and line.startswith("''", at):
                at += 1
            else:
                return at
        at += 1
    return start
