"""Parsing: tags, payloads, what is last wins, and the places of errors."""

import subprocess
import sys

import pytest

from forgather_fn.config import ConfigError, Graph, parse, render
from forgather_fn.config.graph import Call, Items, Pairs, Scalar, Var


def node(text: str) -> object:
    graph = parse(text)
    return graph.nodes[graph.targets["x"]]


def values(graph: Graph, refs: tuple[int, ...]) -> list[object]:
    return [graph.nodes[ref].value for ref in refs]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("payload", "args", "kwargs"),
    [
        ("[1, 2]", [1, 2], {}),
        ("{a: 1, b: 2}", [], {"a": 1, "b": 2}),
        ("{args: [1], kwargs: {a: 2}}", [1], {"a": 2}),
        ("{args: [1]}", [1], {}),
        ("{kwargs: {args: 2}}", [], {"args": 2}),
        ("{args: 1}", [], {"args": 1}),
        ("{args: [1], a: 2}", [], {"args": None, "a": 2}),
        ("{arg10: 3, arg2: 2, arg1: 1, arg: 4}", [1, 2, 3], {"arg": 4}),
        ("{arg0: 1, arg0: 2}", [2], {}),
        ("3", ["3"], {}),
        ("", [], {}),
        ("[]", [], {}),
        ("{}", [], {}),
    ],
)
def test_payloads(payload, args, kwargs):
    graph = parse(f"x: !call:dict {payload}")
    found = graph.nodes[graph.targets["x"]]
    assert isinstance(found, Call)
    assert values(graph, found.args) == args
    named = {name: getattr(graph.nodes[ref], "value", None) for name, ref in found.kwargs}
    assert named == kwargs


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("call", "singleton"),
        ("singleton", "singleton"),
        ("factory", "factory"),
        ("partial", "partial"),
        ("lambda", "partial"),
        ("meta", "meta"),
    ],
)
def test_tags_that_call(tag, kind):
    assert node(f"x: !{tag}:torch.nn:Linear@layer []") == Call(kind, "torch.nn:Linear", name="layer")


def test_other_tags():
    assert node("x: !var seed") == Var("seed")
    assert node("x: !var {name: seed, default: 1}") == Var("seed", 0)
    assert node("x: !list []") == Items("list", (), tagged=True)
    assert node("x: !list:@n []") == Items("list", (), "n", tagged=True)
    assert node("x: !tuple") == Items("tuple", (), tagged=True)
    assert node("x: !dict {1: 2}") == Pairs("dict", ((1, 0),), tagged=True)
    assert node("x: []") == Items("list", ())
    assert node("x: !!str 1") == Scalar("1")
    assert node("x: !!float 1") == Scalar(1.0)


def test_a_dlist_erases_and_replaces_in_place():
    graph = parse("x: !dlist {a: 1, b: 2, c: 3, b: ~, a: 4}")
    found = graph.nodes[graph.targets["x"]]
    assert isinstance(found, Pairs)
    assert [(key, graph.nodes[ref].value) for key, ref in found.items] == [("a", 4), ("c", 3)]  # type: ignore[union-attr]


def test_the_last_value_of_a_key_counts_in_the_place_of_the_first():
    graph = parse("a: 1\nb: 2\na: 3")
    assert {name: graph.nodes[ref].value for name, ref in graph.targets.items()} == {"a": 3, "b": 2}  # type: ignore[union-attr]
    assert list(graph.targets) == ["a", "b"]


def test_keys_with_a_dot_are_no_targets_and_may_be_repeated():
    graph = parse(".define: &x [1]\n.define: &y [2]\nmain: [*x, *y]")
    assert list(graph.targets) == ["main"]
    assert len(graph.nodes) == 5


def test_merged_keys_give_way_to_own_ones():
    graph = parse(".base: &base {a: 1, b: [2]}\n.other: &other {a: 0, c: 3}\nx: {a: 5, <<: [*base, *other], d: 4}")
    found = graph.nodes[graph.targets["x"]]
    assert isinstance(found, Pairs)
    assert [key for key, _ in found.items] == ["a", "b", "c", "d"]
    assert graph.nodes[found.items[0][1]] == Scalar(5)
    assert parse("x: {'<<': 1}").nodes[1] == Pairs("dict", (("<<", 0),))


def test_what_nobody_refers_to_is_left_out():
    assert len(parse(".define: &x !call:os:system [ls]\nmain: 1").nodes) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: !cal:dict []", "unknown tag !cal:dict: did you mean !call?"),
        ("x: !!python/object/apply:os.system [ls]", "unknown tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("x: !call []", "'' is nothing that can be called"),
        ("x: !call:a-b []", "'a-b' is nothing that can be called"),
        ("x: !call:a.b:c:d []", "'a.b:c:d' is nothing that can be called"),
        ("x: !call:dict@a-b []", "'a-b' is no name"),
        ("x: !list {a: 1}", "!list takes a sequence, got a mapping"),
        ("x: !dict [1]", "!dict takes a mapping, got a sequence"),
        ("x: !tuple 1", "!tuple takes a sequence or mapping, got '1'"),
        ("x: !var", "!var takes a name"),
        ("x: !var {nam: y}", "!var takes a name"),
        ("x: !var:y z", "expected !var alone"),
        ("x: ! y", "unknown tag !:"),
        ("x: !!int y", "!!int 'y': this is no int"),
        ("x: !!int [1]", "!!int takes a plain value"),
        ("x: *nothing", "*nothing: no anchor before this has that name"),
        ("a: &there 1\nx: *ther", "did you mean *there?"),
        ("x: &x [*x]", "*x: this lies inside of it"),
        ("x: &x !call:dict {a: [*x]}", "*x: this lies inside of it"),
        ("x: {[1]: 2}", "a key must be a plain value"),
        ("x: {*y : 2}", "a key must be a plain value"),
        ("x: {<<: 1}", "<< takes a mapping"),
        ("x: !call:dict {1: 2}", "1 is no name of an argument"),
        ("1: 2", "1 is no name of a target"),
        ("[1]", "expected a mapping of targets"),
        ("x: [1", "not valid YAML while parsing a flow sequence"),
        ("x: 1\n--- \ny: 1", "expected one document, found another"),
        ("x: [!call:dict@a {b: 1}, !call:dict@a {}]", "two nodes are named @a, the other at"),
        ("x: '\x00'", "not valid YAML"),
    ],
)
def test_what_is_not_valid_is_refused(text, message):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert message in str(error.value)


def test_an_overridden_name_may_be_used_again():
    parse("x: !call:dict@a {}\nx: !call:list@a []")


def test_an_error_names_template_line_block_and_key(tmp_path):
    (tmp_path / "base.yaml").write_text("[main]\nmain:\n  args:\n    lr: 1\n")
    (tmp_path / "leaf.yaml").write_text(
        "-- extends 'base.yaml'\n[main]\n    == super()\n    -- set x = 1\n    op: [!cal:dict {}]\n"
    )
    with pytest.raises(ConfigError) as error:
        parse(render("leaf.yaml", [tmp_path]))
    assert str(error.value).split("\n")[1:] == [
        "  at leaf.yaml, line 5, in block main",
        "    | op: [!cal:dict {}]",
        "  key main.args.op[0]",
    ]


def test_the_place_of_plain_text_is_its_line():
    with pytest.raises(ConfigError, match=r"at <text>, line 2\n    \| b: !nothing"):
        parse("a: 1\nb: !nothing 1")


def test_parsing_imports_nothing():
    script = """
import sys
from forgather_fn.config import parse
before = set(sys.modules)
parse("x: !call:antigravity:main [!call:torch.hub:load [], !call:xml.dom:minidom []]")
assert set(sys.modules) == before, set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
