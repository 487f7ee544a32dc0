"""Dumping and parsing: the same graph, for graphs of all kinds."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_fn.config import ConfigError, Graph, dump, parse
from forgather_fn.config.emit import inline
from forgather_fn.config.graph import Call, Items, Pairs, Scalar, Var, graph_of
from forgather_fn.config.scalars import scalar, written
from tests.config.graphs import graphs, texts, values


@given(graphs())
@settings(deadline=None, max_examples=200)
def test_a_graph_is_read_back_as_it_was(graph: Graph) -> None:
    assert parse(dump(graph)) == graph


@given(graphs())
@settings(deadline=None, max_examples=50)
def test_dumping_is_stable(graph: Graph) -> None:
    assert dump(parse(dump(graph))) == dump(graph)


@given(values)
def test_a_scalar_is_read_back_as_it_was(value: object) -> None:
    found = parse(f"x: {inline(value)}").nodes[0]
    assert found == Scalar(value)  # type: ignore[arg-type]
    if not isinstance(value, str):
        assert Scalar(scalar(written(value))) == found  # type: ignore[arg-type]


@given(st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)))
def test_inline_yaml_is_one_line_and_read_back(value: object) -> None:
    text = inline(value)
    assert "\n" not in text
    assert plain(parse(f"x: {text}")) == repr(value)


def plain(graph: Graph) -> str:
    def of(ref: int) -> object:
        node = graph.nodes[ref]
        if isinstance(node, Scalar):
            return node.value
        if isinstance(node, Items):
            return [of(one) for one in node.items]
        assert isinstance(node, Pairs)
        return {key: of(one) for key, one in node.items}

    return repr(of(graph.targets["x"]))


def test_sharing_is_part_of_what_is_compared() -> None:
    assert parse("a: &x [1]\nb: *x") != parse("a: [1]\nb: [1]")
    assert parse("a: &x 1\nb: *x") == parse("a: 1\nb: 1")  # a number has nothing to share


@pytest.mark.parametrize(
    "text",
    [
        "lr: 1e-05",
        "a: &x !call:dict@opt {}\nb: [*x, *x]",
        "a: !call:dict {args: [1], kwargs: {args: 2, arg1: 3}}",
        "a: !call:dict {args: 1}",
        "a: !var {name: x, default: !call:dict []}",
        "a: !dlist:@n {x: 1, y: !tuple []}",
        "a: {1: x, 1.0: y, true: z, ~: w, '1': v}",
        "a: ['yes', 'null', '1e5', '<<', '~', '', ' x ', 'a: b', '# x', \"a\\nb\", '!call:x']",
        "{}",
    ],
)
def test_chosen_texts(text: str) -> None:
    assert parse(dump(parse(text))) == parse(text)


def test_small_numbers_stay_numbers() -> None:
    assert parse(dump(parse("lr: 1e-05"))).nodes == (Scalar(1e-05),)
    assert math.copysign(1, parse("x: -0.0").nodes[0].value) == -1  # type: ignore[union-attr,arg-type]


def test_a_graph_made_by_hand_is_put_in_order() -> None:
    nodes = {7: Scalar(1), 3: Items("list", (7, 7)), 5: Call("singleton", "dict", (), (("a", 3), ("b", 3)))}
    graph = graph_of(nodes, {"main": 5})
    assert parse(dump(graph)) == graph == parse("main: !call:dict {a: &x [1, 1], b: *x}")
    assert Var("x") != Var("y")


def test_a_circle_is_refused() -> None:
    with pytest.raises(ConfigError, match="refers to itself"):
        graph_of({0: Items("list", (0,))}, {"main": 0})
