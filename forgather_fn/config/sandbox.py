"""Jinja's sandbox, bounded, and with the origin of every piece of output."""

import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

from jinja2 import BaseLoader, StrictUndefined, Template, nodes
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from forgather_fn.config import blocks
from forgather_fn.config import text as texts
from forgather_fn.config.bounds import NUMBER, SEARCH, SOURCE, Budget, extent
from forgather_fn.config.errors import ConfigError, Position
from forgather_fn.config.preprocess import preprocess
from forgather_fn.config.sources import Sources

# fmt: off
_FILTERS: Final = frozenset({
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "escape", "e", "first",
    "float", "format", "forceescape", "groupby", "indent", "int", "items", "join", "last", "length", "list",
    "lower", "map", "max", "min", "pprint", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "slice", "sort", "string", "sum", "title", "tojson", "truncate", "unique", "upper",
    "wordcount",
})
# fmt: on
# fmt: off
_STRING_METHODS: Final = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper", "zfill",
})
# fmt: on
_ANY_NUMBER: Final = frozenset({"d", "default", "toyaml", "select", "reject", "selectattr", "rejectattr", "map"})
"""Filters whose arguments are values, and not widths or counts."""
_WIDE: Final = re.compile(r"%[-+ #0]*(?:\d*\.)?(?:\d{6}|\*)")


class Sandbox(SandboxedEnvironment):
    """The environment of one rendering: it finds templates, traces output, and counts what is done.

    It overrides what Jinja documents to be overridden; nothing of the rendering outlives it.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})
    concat = staticmethod(texts.joined)

    def __init__(self, sources: Sources, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            keep_trailing_newline=True,  # so that what is included does not swallow the line that follows
            undefined=StrictUndefined,
            loader=_Loader(sources),
            extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"],
            cache_size=-1,
        )
        self.sources = sources
        self.budget = Budget()
        self.names: set[str] = set()
        self.outlines: dict[str, blocks.Outline] = {}
        self.parents: dict[str, list[str]] = {}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        known = {name: function for name, function in self.filters.items() if name in _FILTERS}
        known = {**known, "trim": texts.stripped, **filters}
        self.filters = {name: self._bounded(name, function) for name, function in known.items()}

    def join_path(self, template: str, parent: str) -> str:
        """Find what a template means by a name."""
        return self.sources.locate(template, parent)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        assert name is not None
        found = self.sources.loaded[name]
        lines = source.split("\n")
        if unread := blocks.unread_extends(lines):
            problem = f"this extends nothing{blocks.meant(lines[unread - 1])}"
            raise ConfigError(problem, self.place(name, unread + found.line - 1))
        tree = super()._parse(preprocess(source), name, filename)
        if loose := blocks.between(tree, lines):
            problem = "a template that extends another consists of blocks, and this line is in none of them"
            raise ConfigError(f"{problem}{blocks.meant(lines[loose - 1])}", self.place(name, loose + found.line - 1))
        tree.set_environment(self)
        self.names |= {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        self.outlines[name] = blocks.outline_of(tree, found.line - 1)
        return _Tracing(found.name, found.line - 1).visit(tree, None)  # type: ignore[no-any-return]

    def traced(self, value: Any, name: str, line: int, block: str | None) -> str:
        """Give the value of an expression as output, with its origin."""
        text = self.budget.write(str(self.budget.charge(value)))
        return text if isinstance(text, texts.Text) else texts.at(text, self.place(name, line, block))

    def literal(self, text: str, name: str, line: int, block: str | None) -> str:
        """Give text of a template as output, with the origin of each line."""
        self.budget.write(text)
        return texts.literal(text, self.place(name, line, block), self.sources.loaded[name].lines)

    def place(self, name: str, line: int, block: str | None = None) -> Position:
        """Tell where a line of a template, counted in its file, is."""
        source = self.sources.loaded[name]
        here = source.lines[line - 1] if 0 < line <= len(source.lines) else ""
        return Position(source.file, line, block, here)

    def extended(self, parent: Any, name: str) -> Any:
        """Note that a template extends another, and give the other."""
        if isinstance(parent, str):
            self.parents.setdefault(name, []).append(self.sources.locate(parent, name))
        return parent

    def in_vain(self, *, ended: bool) -> ConfigError | None:
        """Make the error of a block that no template takes, if there is one; ended says whether all is rendered."""
        found = blocks.in_vain(self.outlines, self.parents, ended=ended)
        if found is None:
            return None
        template, block, problem = found
        return ConfigError(problem, self.place(template, self.outlines[template].blocks[block][0], block))

    def counted(self, items: Iterable[Any]) -> Iterable[Any]:
        """Pay for all items of a loop before it begins."""
        if not isinstance(items, str | list | tuple | dict | range):
            items = list(items)
        self.budget.pay(len(items))
        return items

    def sized(self, value: Any) -> Any:
        """Pay for a value by its size."""
        return self.budget.charge(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what can make much of little, if it is not too much."""
        self.budget.charge(right)
        if operator == "%":
            _check_format(left, right)
        elif operator == "**" and (_size(left) > SOURCE or _size(right) > NUMBER or _size(left) * _size(right) > 1e7):
            raise ConfigError(f"a template computes {left!r} ** {right!r}, which is too large")
        elif operator == "*" and max(_length(left) * _size(right), _length(right) * _size(left)) > SOURCE:
            raise ConfigError("a template repeats a value too often")
        return self.budget.charge(self.binop_table[operator](left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow public attributes, and of strings the methods that cannot make much of little."""
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Take the place of a string's ``format``, as Jinja's sandbox does, with bounds."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_string("format", value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return bounded

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, and pay for what it gives."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._check_string(getattr(function, "__name__", ""), owner, args, kwargs)
        for one in (owner, *args, *kwargs.values()):
            self.budget.charge(one)
        return self.budget.charge(super().call(context, function, *args, **kwargs))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            value, rest = (values[0], values[1:]) if values else (None, ())
            for one in (value, *rest, *kwargs.values()):
                self.budget.charge(one)
            if name not in _ANY_NUMBER:
                self._check_string(name, str(value) if name in ("replace", "format") else value, rest, kwargs)
            return self.budget.charge(function(*args, **kwargs))

        return bounded

    def _check_string(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if name == "format":
            _check_format(value, given)
        if isinstance(value, str) and any(len(value) * len(one) > SEARCH for one in given if isinstance(one, str)):
            raise ConfigError(f"{name}: a template searches a long text for another")
        adds_lists = name == "sum" and any(isinstance(one, list | tuple) for one in given)
        if adds_lists and _length(value) * extent(value) > SEARCH:  # each is copied again for each that follows
            raise ConfigError("sum: a template adds up too many lists")
        if name in ("indent", "tojson"):
            width = max((_size(one) if isinstance(one, int) else _length(one) for one in given), default=0)
            if (value.count("\n") if isinstance(value, str) else extent(value)) * width > 10 * SOURCE:
                raise ConfigError(f"{name}: a template makes a value that is too large")
        if name != "sum" and any(isinstance(one, int) and abs(one) > NUMBER for one in given):
            raise ConfigError(f"{name}: a template asks for a width or count above {NUMBER:,}")
        if name == "replace" and _length(value) * max(map(_length, given), default=0) > 10 * SOURCE:
            raise ConfigError("replace: a template makes a value that is too large")
        if name == "join":
            items = args[0] if isinstance(value, str) and args else value
            between = value if isinstance(value, str) else next(iter(given), "")
            total = sum(_length(one) + _length(between) for one in items) if isinstance(items, list | tuple) else 0
            if total > SOURCE:
                raise ConfigError("join: a template makes a value that is too large")


class _Loader(BaseLoader):
    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def load(
        self, environment: Any, name: str, globals: Any = None
    ) -> Template:  # what Jinja asks of a loader, without its cache of bytecode
        source = self.sources.load(name)
        code = environment.compile(source.text, name, source.name)
        return environment.template_class.from_code(  # type: ignore[no-any-return]
            environment, code, environment.make_globals(globals), lambda: True
        )


class _Tracing:
    """Rewrite a syntax tree so that output is traced, and what takes time or memory is counted."""

    def __init__(self, name: str, offset: int) -> None:
        self.name = name
        self.offset = offset

    def visit(self, node: Any, block: str | None) -> Any:
        if isinstance(node, nodes.Block):
            block = node.name
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, self.visit(value, block))
            elif isinstance(value, list):
                value[:] = [self.visit(one, block) if isinstance(one, nodes.Node) else one for one in value]
        if isinstance(node, nodes.Extends):
            node.template = self._call("extended", node.template, nodes.Const(self.name))
        elif isinstance(node, nodes.Output):
            node.nodes = [self._traced(one, block) for one in node.nodes]
        elif isinstance(node, nodes.For):
            node.iter = self._call("counted", node.iter)
        elif isinstance(node, nodes.Concat):
            node.nodes = [self._call("sized", one) for one in node.nodes]
            return self._call("sized", node)
        elif isinstance(node, nodes.Assign):
            node.node = self._call("sized", node.node)
        elif isinstance(node, nodes.Operand):
            node.expr = self._call("sized", node.expr)
        elif isinstance(node, nodes.List | nodes.Dict) or _is_made(node):
            return self._call("sized", node)
        return node

    def _traced(self, node: nodes.Node, block: str | None) -> nodes.Expr:
        rest = [nodes.Const(one) for one in (self.name, node.lineno + self.offset, block)]
        if isinstance(node, nodes.TemplateData):
            return self._call("literal", nodes.Const(node.data, lineno=node.lineno), *rest)
        return self._call("traced", node, *rest)

    def _call(self, method: str, first: nodes.Node, *rest: nodes.Expr) -> nodes.Call:
        function = nodes.EnvironmentAttribute(method)
        call = nodes.Call(function, [cast(nodes.Expr, first), *rest], [], None, None)
        for node in (function, call, *rest):
            node.set_lineno(first.lineno)
            if first.environment is not None:
                node.set_environment(first.environment)
        return call


def _is_made(node: nodes.Node) -> bool:
    """Tell a tuple that is made, and not assigned to, and a part that is copied."""
    if isinstance(node, nodes.Tuple):
        return node.ctx == "load"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)


def _check_format(text: Any, given: Any) -> None:
    """Refuse a format string, of either kind, whose widths are large or come from elsewhere, or that makes too much."""
    if not isinstance(text, str):
        return
    if max(text.count("%"), text.count("{")) * extent(given) > 10 * SOURCE:
        raise ConfigError("format: a template makes a value that is too large")
    try:
        specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)]
    except ValueError:
        specs = []  # no format string of this kind; formatting says so
    if _WIDE.search(text) or any("{" in spec or re.search(r"\d{6}", spec) for spec in specs):
        raise ConfigError(f"a template formats with {text[:80]!r}: widths must be numbers below {NUMBER:,}")


def _size(value: Any) -> float:
    return abs(value) if isinstance(value, int | float) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 1 if value is not None else 0
