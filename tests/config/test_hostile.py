"""Hostile inputs: what a configuration from anywhere can do is nothing, or an error, soon."""

import contextlib
import subprocess
import sys
import time
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.config import ConfigError, build, parse, render
from forgather_fn.config.allow import resolve
from forgather_fn.config.arguments import replaced
from forgather_fn.config.dynamic import declared
from forgather_fn.config.redact import redacted_text
from forgather_fn.config.registry import NAMES

PIECES = [
    *("-- ", "== ", "=> ", "<< ", ">> ", "## ", "[a]", "[b!]", "#--- p ---", "{% ", " %}", "{{ ", " }}", "{# ", " #}"),
    *("block a", "endblock", "for i in range(9)", "endfor", "if x", "endif", "extends 'p'", "include 'p'", "super()"),
    *("set ns = namespace()", "set ns.x = 1", "macro m(x)", "endmacro", "m(1)", "raw", "endraw", "x", "y", "|trim"),
    *(
        "!call:dict",
        "!factory:",
        "!var",
        "!dlist",
        "!tuple",
        "@n",
        "&a ",
        "*a",
        "<<: *a",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
    ),
    *(
        ",",
        "'",
        '"',
        "|",
        ">",
        "?",
        "%TAG ! x",
        "---",
        "...",
        "1e-5",
        "~",
        "\n",
        "\n",
        "\n",
        "  ",
        "    ",
        "\t",
        "\0",
        "é",
    ),
]
soup = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join)


@given(soup)
@settings(max_examples=400)
def test_whatever_is_rendered_gives_text_or_an_error(text):
    with contextlib.suppress(ConfigError):
        parse(render(text + "\n", variables={"x": 1, "y": "z"}))


@given(soup)
@settings(max_examples=400)
def test_whatever_is_parsed_gives_a_graph_or_an_error(text):
    before = set(sys.modules)
    with contextlib.suppress(ConfigError):
        parse(text)
    assert set(sys.modules) == before


BOMBS = {
    "nested loops": "-- for i in range(99999)\n-- for j in range(99999)\n-- set x = i\n-- endfor\n-- endfor\n",
    "nested loops over a list": "-- set r = range(99999)|list\n-- for i in r\n-- for j in r\n-- endfor\n-- endfor\n",
    "much output": "-- for i in range(99999)\n{{ 'x' * 999 }}\n-- endfor\n",
    "long range": "{{ range(10**9) }}",
    "repetition": "{{ 'x' * 10**9 }}",
    "repetition of a list": "{{ [1] * 10**9 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squaring": "-- set ns = namespace(x=9)\n-- for i in range(99)\n-- set ns.x = ns.x * ns.x\n-- endfor\n",
    "doubling": "-- set ns = namespace(x='a')\n-- for i in range(99)\n-- set ns.x = ns.x ~ ns.x\n-- endfor\n",
    "doubling a list": "-- set x = [1]\n-- for i in range(99)\n-- do x.extend(x)\n-- endfor\n",
    "doubling by join": "-- set n = namespace(x='a')\n-- for i in range(99)\n-- set n.x = [n.x, n.x]|join\n-- endfor\n",
    "join": "{{ (['x' * 99999] * 99999) | join }}",
    "method join": "{{ ''.join(['x' * 99999] * 99999) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "method replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "width of a filter": "{{ 'x' | center(10**9) }}",
    "width of indent": "{{ 'x\ny' | indent(10**9) }}",
    "width of tojson": "{{ [1] | tojson(10**9) }}",
    "width of a method": "{{ 'x'.ljust(10**9) }}",
    "width of a format": "{{ '{:1000000000}'.format(1) }}",
    "width of a nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "width of a percent format": "{{ '%1000000000d' % 1 }}",
    "width of a starred format": "{{ '%*d' % (10**9, 1) }}",
    "width of the format filter": "{{ '%1000000000d' | format(1) }}",
    "digits": "{{ 1 | round(10**9, 'ceil') }}",
    "recursive macro": "-- macro m(x)\n== m(x)\n-- endmacro\n== m(1)\n",
    "exploding macro": "-- macro m(x)\n-- if x\n== m(x - 1)\n== m(x - 1)\n-- endif\n-- endmacro\n== m(60)\n",
    "recursive loop": "-- for x in [1] recursive\n== loop([1])\n-- endfor\n",
    "include of itself": "-- include 'p'\n#--- p ---\n-- include 'p'\n",
    "extends itself": "-- include 'p'\n#--- p ---\n-- extends 'p'\n",
    "deep brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "deep blocks": "-- if 1\n" * 500 + "-- endif\n" * 500,
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "doubling by plus": "-- set n = namespace(x='a')\n-- for i in range(40)\n-- set n.x = n.x + n.x\n-- endfor\n",
    "doubling a list by plus": "-- set n = namespace(x=[1])\n-- for i in range(40)\n-- set n.x = n.x + n.x\n-- endfor",
    "division of large numbers": "{{ ('f' * 999999) | int(0, 16) // ('f' * 499999) | int(0, 16) }}",
    "one argument many times": "{{ ('{0}' * 300000).format('x' * 900000) }}",
    "one value many times": "{{ ('%(a)s' * 190000) % {'a': 'x' * 900000} }}",
    "one value many times by the filter": "{{ ('%(a)s' * 190000) | format(a='x' * 900000) }}",
    "indent of many lines": "{{ ('\n' * 900000) | indent(90000) }}",
    "indent of much JSON": "{{ range(99999) | list | tojson(90000) }}",
    "search from the right": "{{ ('a' * 999999).rfind('a' * 400000 ~ 'b' ~ 'a' * 99999) }}",
    "split from the right": "{{ ('a' * 999999).rsplit('a' * 400000 ~ 'b' ~ 'a' * 99999) }}",
    "sum of lists": "{{ ([[1] * 10] * 50000) | sum(start=[]) | length }}",
    "searches in a loop": "-- set x = 'a' * 900000\n-- for i in range(99999)\n-- if 'bbb' in x\n-- endif\n-- endfor\n",
    "slices in a loop": "-- set x = 'a' * 900000\n-- for i in range(99999)\n-- if x[1:]\n-- endif\n-- endfor\n",
}
NESTED = "-- set n = namespace(x={}, y={})\n-- for i in range(40)\n{}-- endfor\n{{{{ {} }}}}\n"
LISTS = "-- set n.x = [n.x, n.x]\n-- set n.y = [n.y, n.y]\n"
APPENDED = "-- set y = []\n-- do y.append(n.x)\n-- do y.append(n.x)\n-- set n.x = y\n"
NAMESPACES = "-- set y = namespace()\n-- set y.a = n.x\n-- set y.b = n.x\n-- set n.x = y\n"
BOMBS |= {
    "nested lists": NESTED.format("[1]", "[1]", LISTS, "n.x"),
    "nested lists as a string": NESTED.format("[1]", "[1]", LISTS, "n.x ~ ''"),
    "nested lists by repr": NESTED.format("[1]", "[1]", LISTS, "repr(n.x) | length"),
    "nested lists as YAML": NESTED.format("[1]", "[1]", LISTS, "n.x | toyaml | length"),
    "nested lists as JSON": NESTED.format("[1]", "[1]", LISTS, "n.x | tojson | length"),
    "nested lists compared": NESTED.format("[1]", "[1]", LISTS, "n.x == n.y"),
    "nested tuples as a key": NESTED.format("1", "1", LISTS.replace("[", "(").replace("]", ")"), "{n.x: 1} | length"),
    "nested lists by append": NESTED.format("[1]", "[1]", APPENDED, "n.x"),
    "nested namespaces": NESTED.format("1", "1", NAMESPACES, "n.x"),
    "nested namespaces in an error": NESTED.format("1", "1", NAMESPACES, "{}[n.x]"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_bomb_ends_soon_in_an_error(name, tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMBS[name])
    start = time.process_time()
    with pytest.raises(ConfigError):
        render("bomb.yaml", [tmp_path])
    assert time.process_time() - start < 8


@pytest.mark.parametrize("name", [name for name in BOMBS if "format" in name])
def test_a_wide_format_is_refused_before_it_is_made(name):
    with pytest.raises(ConfigError, match=r"widths must be numbers below|width or count above"):
        render(BOMBS[name])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('{0.__class__}' | format(1)) }}{{ raise.__globals__ }}",
        "{{ getenv.__globals__ }}",
        "{{ getenv.__self__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace.__init__ }}",
        "{{ joinpath.__code__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ cycler.__init__ }}",
        "{{ 'x'.encode() }}",
        "{{ lipsum() }}",
        "{{ config }}",
        "{% import 'os' as os %}",
        "{{ [].__class__.__base__ }}",
        "{{ (1).__class__ }}",
        "{{ now().__class__ }}",
        "{{ versions.__class__.__mro__ }}",
        "{{ range.__init__ }}",
    ],
)
def test_a_template_sees_no_private_names(template):
    with pytest.raises(ConfigError):
        render(template)


def test_a_large_template_is_refused(tmp_path):
    (tmp_path / "large.yaml").write_text("a" * 2_000_000)
    with pytest.raises(ConfigError, match="at most 1,000,000"):
        render("large.yaml", [tmp_path])
    (tmp_path / "large.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        render("large.yaml", [tmp_path])


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
YAML_BOMBS = {
    "laughs": LAUGHS,
    "factories": LAUGHS.replace("[", "!factory:list ["),
    "deep flow": "x: " + "[" * 200_000,
    "deep block": "\n".join(" " * i + "a:" for i in range(1_000)),
    "deep dashes": "x:\n  " + "- " * 50_000,
    "deep aliases": "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500)),
    "deep keys": "x: " + "{a: " * 10_000,
    "questions": "? " * 50_000,
    "many nodes": "x: [" + "1," * 50_000 + "]",
    "merges": "a: &a {" + ",".join(f"k{i}: 1" for i in range(1_000)) + "}\nb: {<<: [" + "*a," * 1_000 + "]}",
    "large": "x: '" + "a" * 2_000_000 + "'",
    "digits": "x: " + "9" * 10_000 + "\ny: [",
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_a_yaml_bomb_ends_soon_in_an_error(name):
    start = time.process_time()
    with pytest.raises(ConfigError):
        parse(YAML_BOMBS[name])
    assert time.process_time() - start < 8


RESOLVABLE = [
    *("torch.utils.collect_env:run", "torch:load", "torch.hub:load", "torch:os.system", "torch:jit.load", "torch:save"),
    *("torch.utils.data:os.system", "torch.nn:functional.relu", "torch.nn:Module.__init__", "torch.nn:Parameter"),
    *(
        "torch.nn:Linear.forward",
        "torch.nn:modules.linear.Linear",
        "torch.nn.modules.linear:Linear",
        "torch.nn:warnings",
    ),
    *("torch.optim:Adam.step", "torch.optim:lr_scheduler.LambdaLR", "torch.optim.adam:_to_scalar", "torch.nn:parallel"),
    *("torch.utils.data:random_split", "torch.utils.data:dataloader.default_collate", "torch.utils.cpp_extension:load"),
    *(
        "os:system",
        "builtins:eval",
        "eval",
        "exec",
        "open",
        "getattr",
        "type",
        "__import__",
        "compile",
        "vars",
        "str.format_map",
    ),
    *(
        "dict.__class__",
        "dict.fromkeys",
        "str.__class__",
        "subprocess:run",
        "pickle:loads",
        "yaml:load",
        "functools:reduce",
    ),
    *("forgather_fn.config:build", "forgather_fn.config:render", "forgather_fn.cli:main", "forgather_fn:losses"),
    *(
        "forgather_fn.checkpoint.system:remove_tree",
        "forgather_fn.checkpoint.commit:discard",
        "forgather_fn.checkpoint:load",
    ),
    *("forgather_fn.checkpoint.cli:command", "forgather_fn.state:torch.load", "forgather_fn:importlib.import_module"),
    *("forgather.ml.control:command", "forgather.ml.launch:run", "forgather.ml:_private", "forgather.ml:torch.load"),
    "/bin/something.py:main",
]


@pytest.mark.parametrize("target", RESOLVABLE)
def test_what_is_not_admitted_is_refused(target):
    with pytest.raises(ConfigError) as error:
        build(parse(f"main: !partial:{target} []"))
    assert any(part in str(error.value) for part in ("--allow", "never called", "is not there", "cannot be called"))


@pytest.mark.parametrize("target", ["eval", "os:system", "torch.hub:load"])
def test_a_name_is_checked_by_itself_too(target):
    with pytest.raises(ConfigError, match="--allow"):
        resolve(target, [])


def test_nothing_is_imported_before_all_names_were_looked_at():
    script = """
import sys
from forgather_fn.config import ConfigError, build, parse
before = set(sys.modules)
try:
    build(parse("main: [!call:torch.nn:ReLU [], !call:dict {}, !call:antigravity:x [], !call:this:s []]"))
except ConfigError as error:
    assert "--allow antigravity:x" in str(error), error
    assert "--allow this:s" in str(error), error
else:
    raise SystemExit("was built")
assert not {"antigravity", "this"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_package_admits_what_is_defined_in_it_only(tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nfrom os import system\nfrom mine.models import Model, make, _hidden\n"
    )
    (package / "models.py").write_text(
        "class Model:\n    pass\ndef make():\n    return 1\ndef _hidden():\n    return 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build(parse("main: !call:mine:make []"), allow=["mine"]) == 1
    assert build(parse("main: !call:mine.models:make []"), allow=["mine.models:make"]) == 1
    assert build(parse("main: !call:mine:_hidden []"), allow=["mine:_hidden"]) == 2
    for target in ("mine:system", "mine:os.system", "mine:_hidden", "mine:Model.__init__", "mine2:x"):
        with pytest.raises(ConfigError):
            build(parse(f"main: !call:{target} []"), allow=["mine"])
    with pytest.raises(ConfigError, match="--allow mine:Model"):
        build(parse("main: !call:mine:Model []"), allow=["mine:make"])


@pytest.mark.parametrize(
    "allow", ["torch", "os", "builtins", "subprocess", "forgather_fn", "torch.utils", "a b", "", "x:", "x:1"]
)
def test_an_allowance_that_is_too_wide_is_refused(allow):
    with pytest.raises(ConfigError):
        build(parse("main: 1"), allow=[allow])
    with pytest.raises(ConfigError, match="allow takes a collection"):
        build(parse("main: 1"), allow="mine")


def test_the_configuration_cannot_allow_anything():
    with pytest.raises(ConfigError, match="--allow os:system"):
        build(parse("allow: ['os:system']\nmeta: {allow: ['os:system']}\nmain: !call:os:system [ls]"))


@pytest.mark.parametrize(
    "text", ["{0.__class__}", "{0[__class__]}", "{a._x}", "{0:>1000000000}", "{0:{1}}", "{0:>99999}"]
)
def test_format_strings_see_no_private_names_and_stay_small(text):
    with pytest.raises(ConfigError):
        build(parse(f"main: !call:str.format {{arg0: '{text}', arg1: x, arg2: 99999999, a: y}}"))


def test_every_public_name_was_thought_of():
    left_out = {"Batch", "Gradients", "Observer", "Optimizer", "Preempted", "Program", "Steps", "Stream", "Tick"}
    left_out |= {"Aborted", "TrainState", "controlled", "difference", "fold", "last", "serve"}
    left_out |= {
        "changing",
        "frozen",
        "members",
        "memory",
        "refreshed_statistics",
    }  # of a state, or of a function
    names = {name for name in ff.__all__ if not name.endswith("Error")}
    modules = {name for name in names if isinstance(getattr(ff, name), ModuleType)}
    admitted = {name.removeprefix("forgather_fn:") for name in NAMES if name.startswith("forgather_fn:")}
    assert names - modules - left_out <= admitted


def test_every_name_of_the_registry_is_one_that_can_be_called():
    later = {"forgather_fn:accelerated", "forgather_fn:pipelined"}
    for name in sorted(NAMES - later):
        assert callable(resolve(name, [])), name


@pytest.mark.parametrize(
    "text", ["dynamic_args: !call:dict {}", "dynamic_args: {x: [!factory:torch.nn:Linear [1, 1]]}"]
)
def test_looking_at_a_configuration_calls_nothing(text):
    with pytest.raises(ConfigError, match="dynamic_args takes plain values; it calls"):
        declared(parse(text))


def grown(call: str) -> str:
    steps = "".join(f".a{i}: &a{i} {call.replace('@', f'*a{i - 1}')}\n" for i in range(1, 30))
    return f".a0: &a0 xxxx\n{steps}main: *a29"


@pytest.mark.parametrize(
    "text",
    [
        grown("!call:str.format ['{0}{0}', @]"),
        ".s: &s !call:format ['{0:>9999}', x]\nmain: !call:str.join ['', [" + "*s, " * 200 + "]]",
        grown("!call:format ['{0:>9999}{0:>9999}', @]"),
        "main: !call:str.format {arg0: '" + "{0:9999}" * 9_000 + "', arg1: x}",
    ],
)
def test_what_is_built_does_not_grow_without_bound(text):
    with pytest.raises(ConfigError, match="more than 1,000,000 characters"):
        build(parse(text))


LONG = {
    "blanks in a statement": lambda: render("-- set x = 1" + " " * 500_000 + "+ 1\n"),
    "one word": lambda: redacted_text("a" * 900_000, []),
    "many words": lambda: redacted_text("a " * 400_000, []),
    "many tags": lambda: redacted_text("a_key: " + "&x " * 300_000, []),
    "separators": lambda: render("#" + "-" * 500_000 + " x\n"),
    "quotes": lambda: render("a: " + " '" * 200_001 + "\n"),
    "double quotes": lambda: render("a: " + ' "\\' * 200_001 + "\n"),
    "a long alias": lambda: parse(f"a: &{'x' * 200_000}y 1\nb: *{'x' * 200_000}z"),
    "a long tag": lambda: parse(f"a: !call:{'x.' * 200_000} 1"),
    "a long path": lambda: replaced(parse("a: {b: 1}"), "a." + "b" * 200_000, "1"),
}


@pytest.mark.parametrize("name", LONG)
def test_long_lines_take_time_in_proportion(name):
    start = time.process_time()
    with contextlib.suppress(ConfigError):
        LONG[name]()
    assert time.process_time() - start < 8
