"""Graphs of all kinds, for property tests."""

from typing import Any

from hypothesis import strategies as st

from forgather_fn.config import Graph
from forgather_fn.config.graph import Call, Items, Node, Pairs, Scalar, Var, graph_of

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.sampled_from(
    [
        "yes",
        "null",
        "~",
        "1e-5",
        "1_0",
        "0x",
        "<<",
        "=",
        "-",
        "a: b",
        "a #b",
        "args",
        "arg0",
        "x\ny",
        "{",
        "*a",
        "!a",
        ".inf",
    ]
)
numbers = st.integers(-(10**20), 10**20) | st.floats()
values: st.SearchStrategy[Any] = st.none() | st.booleans() | numbers | texts
TARGETS = ["dict", "str.format", "torch.nn:Linear", "a.b:C.d", "/x/y.py:Z"]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A graph whose nodes refer to those before them, several times or not at all."""
    nodes: dict[int, Node] = {}
    count = draw(st.integers(1, 10))
    for ref in range(count):
        nodes[ref] = draw(_node(ref))
    names = draw(st.lists(texts.filter(lambda name: not name.startswith(".")), min_size=1, max_size=3, unique=True))
    return graph_of(nodes, {name: draw(st.integers(0, count - 1)) for name in names})


@st.composite
def _node(draw: st.DrawFn, ref: int) -> Node:
    refs = st.integers(0, ref - 1) if ref else st.nothing()
    items = tuple(draw(st.lists(refs, max_size=3))) if ref else ()
    keys = draw(st.lists(texts, max_size=3, unique=True)) if ref else []
    pairs = tuple((key, draw(refs)) for key in keys)
    name = draw(st.none() | st.just(f"name{ref}"))
    tagged = draw(st.booleans())
    kind = draw(st.sampled_from(["scalar", "scalar", "items", "pairs", "call", "var"]))
    if kind == "items":
        tuple_ = draw(st.booleans())
        return (
            Items("tuple", items, name, tagged=True)
            if tuple_
            else Items("list", items, name if tagged else None, tagged)
        )
    if kind == "pairs":
        return Pairs("dict", pairs, name if tagged else None, tagged)
    if kind == "call":
        how = draw(st.sampled_from(["singleton", "factory", "partial", "meta"]))
        return Call(how, draw(st.sampled_from(TARGETS)), items, pairs, name)
    if kind == "var":
        variable = draw(texts.filter(lambda text: bool(text.strip())))
        return Var(variable, draw(st.none() | refs) if ref else None)
    return Scalar(draw(values))
