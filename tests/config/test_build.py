"""Building: identity, sharing, variables, and that nothing is kept."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_fn.config import ConfigError, Graph, build, dump, parse, to_python
from forgather_fn.config.graph import Call, Scalar, graph_of
from tests.config.graphs import graphs

HERE = __name__
COUNT: list[str] = []


class Thing:
    """Something whose making is counted."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        COUNT.append("made")
        self.args, self.kwargs = args, kwargs


def sized(size: int, sizes: list[int] = [], rate: "float | None" = None, other: "Missing" = 1) -> object:  # noqa: B006, F821
    return size, sizes, rate


def numbered(size: int, sizes: list[int] = [], rate: "float | None" = None, text: int | str = 0) -> object:  # noqa: B006
    return size, sizes, rate, text


def nothing() -> None:
    COUNT.append("nothing")


def failing() -> None:
    raise RuntimeError("too bad")


@pytest.fixture(autouse=True)
def _count() -> None:
    COUNT.clear()


def made(text: str, target: str = "main", **context: object) -> object:
    text = text.replace("Thing", f"{HERE}:Thing").replace("nothing", f"{HERE}:nothing")
    return build(parse(text), target, context, allow=[f"{HERE}:Thing", f"{HERE}:nothing", f"{HERE}:failing"])


def test_a_singleton_is_one_object_within_a_build_and_not_across():
    graph = parse("main: [&x !call:dict {a: 1}, *x]")
    first, second = build(graph), build(graph)
    assert first[0] is first[1]
    assert first == second
    assert first[0] is not second[0]


def test_a_second_build_sees_another_context():
    graph = parse("main: !call:dict {x: !var x}")
    assert build(graph, context={"x": 1}) == {"x": 1}
    assert build(graph, context={"x": 2}) == {"x": 2}


def test_a_singleton_that_gives_none_is_called_once():
    assert made("main: [&x !call:nothing [], *x, *x]") == [None] * 3
    assert COUNT == ["nothing"]


def test_a_factory_is_called_at_each_occurrence():
    first, second = made("main: [&x !factory:Thing [], *x]")
    assert first is not second


def test_an_aliased_list_or_dict_is_shared():
    first, second = made("main: [&x [1], *x]")
    assert first is second
    assert made("main: [&x {a: 1}, *x]")[0] is not made("main: [&x {a: 1}, *x]")[0]


def test_a_factory_under_a_singleton_is_called_once():
    made("main: [&x !call:dict {a: !factory:Thing []}, *x]")
    assert COUNT == ["made"]


def test_a_list_that_stands_in_a_factory_is_its_own_each_time():
    first, second = made("main: [&x !factory:Thing {a: [1]}, *x]")
    assert first.kwargs["a"] is not second.kwargs["a"]


def test_what_is_shared_stays_shared_under_a_factory():
    first, second = made("main: [&x !factory:Thing {a: !call:dict {}, b: !list [1]}, *x]")
    assert first.kwargs["a"] is second.kwargs["a"]
    assert first.kwargs["b"] is second.kwargs["b"]


def test_a_partial_has_its_arguments_when_it_is_made():
    found = made("main: !partial:Thing [!factory:Thing [], 2]")
    assert isinstance(found, functools.partial)
    assert COUNT == ["made"]
    assert found(3).args[1:] == (2, 3)


def test_a_partial_without_arguments_is_the_function_itself():
    assert made("main: !partial:torch.nn:ReLU") is torch.nn.ReLU


def test_only_the_target_is_built():
    made("main: 1\nother: !call:Thing []")
    assert COUNT == []
    made("main: 1\nother: !call:Thing []", "other")
    assert COUNT == ["made"]


def test_calls_are_made_in_the_order_of_the_text():
    graph = parse("main: !call:torch.nn:Sequential [!call:torch.nn:Linear [2, 2], !factory:torch.nn:Linear [2, 2]]")
    torch.manual_seed(0)
    expected = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.manual_seed(0)
    found = build(graph)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_arguments_are_in_the_order_of_their_numbers():
    assert made("main: !call:Thing {arg1: b, arg0: a, c: d}").args == ("a", "b")


def test_containers():
    assert made("main: [!tuple [1, 2], !dlist {a: 1, b: 2}, !dict {1: 2}, !list [3], [], {}]") == [
        (1, 2),
        [1, 2],
        {1: 2},
        [3],
        [],
        {},
    ]


def test_functions_on_what_is_built():
    text = "main: !call:getitem [!call:values [!var m], 1]"
    assert made(text, m={"a": 1, "b": 2}) == 2
    assert made("main: !call:call [!partial:Thing [1], 2]").args == (1, 2)
    assert made("main: [!call:items [!var m], !call:keys [!var m]]", m={"a": 1}) == [[("a", 1)], ["a"]]
    assert made("main: [!call:named_list [1], !call:named_tuple [1], !call:named_dict {a: 1}]") == [[1], (1,), {"a": 1}]
    assert made("main: !call:str 3") == "3"
    assert made("main: !call:str.format {arg0: '{0}-{a:03}', arg1: x, a: 7}") == "x-007"


def test_variables_have_values_or_defaults():
    text = "main: [!var {name: a, default: !call:Thing []}, !var {name: b, default: ~}]"
    assert made(text, a=1, b=2) == [1, 2]
    assert COUNT == []
    assert isinstance(made(text)[0], Thing)
    with pytest.raises(ConfigError, match=r"variable 'sed' has no value and no default; did you mean 'seed'\?"):
        made("main: !var sed", seed=1)
    with pytest.raises(ConfigError, match="known are none"):
        made("main: !var sed")


def test_meta_is_given_graphs():
    found = made("main: !meta:Thing [!call:torch.nn:Linear [1, 2]]")
    (graph,) = found.args
    assert isinstance(graph, Graph)
    assert isinstance(build(graph), torch.nn.Linear)


def test_a_file_may_be_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def make(x): return x + 1")
    graph = parse(f"main: !call:{path}:make {{x: 1, submodule_searchpath: y}}")
    with pytest.raises(ConfigError, match="--allow"):
        build(graph)
    assert build(graph, allow=[f"{path}:make"]) == 2
    assert build(graph, allow=[str(path)]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main: !call:failing []", "failing failed: RuntimeError: too bad\n  at <text>, line 1\n    | main: !call:"),
        ("main: {a: [!call:torch.nn:Linear [1]]}", "missing 1 required positional argument: 'out_features'"),
        ("main: {a: [!call:torch.nn:Linear [1]]}", "\n  key main.a[0]"),
        ("main: !call:torch.nn:Lineal []", "torch.nn:Lineal is not there: module 'torch.nn' has no attribute 'Lineal'"),
    ],
)
def test_a_failure_says_where(text, message):
    with pytest.raises(ConfigError) as error:
        made(text.replace("failing", f"{HERE}:failing"))
    assert message in str(error.value)


def test_a_target_that_is_not_there():
    with pytest.raises(ConfigError, match="there is no target 'main': the configuration has train, eval"):
        build(parse("train: 1\neval: 2"))


@given(graphs())
@settings(max_examples=100)
def test_generated_code_builds_the_same(graph):
    graph = buildable(graph)
    for target in graph.targets:
        expected = outcome(lambda target=target: build(graph, target, {"given": 1}))
        source = to_python(graph, [target])
        namespace: dict[str, object] = {}
        exec(source, namespace)
        found = outcome(functools.partial(namespace[target], given=1))
        assert found == expected, source


def outcome(make):
    try:
        return shape(make(), {})
    except Exception:
        return "failed"


def shape(value, seen):
    """Describe an object with what is shared in it."""
    if isinstance(value, dict | list | tuple):
        if id(value) in seen and not isinstance(value, tuple):
            return f"#{seen[id(value)]}"
        seen[id(value)] = len(seen)
        inside = value.items() if isinstance(value, dict) else value
        return type(value).__name__, [shape(one, seen) for one in inside]
    if isinstance(value, functools.partial):
        return "partial", value.func.__name__, shape(value.args, seen), shape(value.keywords, seen)
    return repr(value)


def buildable(graph):
    """Give a graph targets and calls that code can be written for."""
    nodes = dict(enumerate(graph.nodes))
    for ref, node in nodes.items():
        if isinstance(node, Call):
            target = "named_list" if not node.kwargs else "named_dict"
            nodes[ref] = Call(
                "singleton" if node.kind == "meta" else node.kind, target, node.args, node.kwargs, node.name
            )
        elif not isinstance(node, Scalar) and hasattr(node, "variable"):
            nodes[ref] = type(node)("given", node.default)
    return graph_of(nodes, {f"target{i}": ref for i, ref in enumerate(graph.targets.values())})


@given(graphs())
@settings(max_examples=50)
def test_building_twice_gives_equal_objects_that_are_not_the_same(graph):
    graph = buildable(graph)
    for target in graph.targets:
        first, second = (outcome(lambda target=target: build(graph, target, {"given": 1})) for _ in range(2))
        assert first == second
        again = outcome(lambda target=target: build(parse(dump(graph)), target, {"given": 1}))
        assert first == again


@given(st.permutations(["a: 1", "b: [2]", "c: !call:dict {}"]))
def test_the_order_of_arguments_does_not_matter(lines):
    assert build(parse("main: !call:dict {" + ", ".join(lines) + "}")) == {"a": 1, "b": [2], "c": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-b: 1", "'a-b' is a target, but no Python identifier"),
        ("class: 1", "'class' is a target"),
        ("dict: !call:dict []", "target 'dict' has the name of something that its code calls"),
        ("main: !call:a.class:B []", "'class' is a part of 'a.class:B'"),
    ],
)
def test_code_is_written_for_identifiers_only(text, message):
    with pytest.raises(ConfigError) as error:
        to_python(parse(text))
    assert message in str(error.value)


def test_code_for_a_root_partial_runs():
    source = to_python(parse("main: !partial:torch.optim:AdamW {lr: 1e-5}"))
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert namespace["main"]().keywords == {"lr": 1e-5}


def test_names_of_nodes_do_not_hide_what_the_code_calls():
    source = to_python(
        parse("main: [!call:torch.nn:ReLU@torch [], !call:torch.nn:ReLU@v1 [], !call:dict@context {x: !var y}]")
    )
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert namespace["main"](y=3)[2] == {"x": 3}


def test_names_that_are_alike_are_told_apart_in_code():
    source = to_python(
        parse(
            "Linear: !call:torch.nn:Linear [1, 2]\n"
            "samplers: [!partial:torch.utils.data:DistributedSampler [], !partial:torch.nn.modules:Linear []]\n"
        )
    )
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert "from torch.nn import Linear as Linear_2\n" in source
    assert "from torch.nn.modules import Linear as Linear_3\n" in source
    assert namespace["Linear"]().out_features == 2
    assert namespace["samplers"]()[1] is torch.nn.Linear


@pytest.mark.parametrize("kind", ["call", "partial"])
@pytest.mark.parametrize(
    ("arguments", "message", "line"),
    [
        ("size: many", "numbered: size='many': expected an integer", 3),
        ("size: [3]", r"numbered: size=\[3\]: expected an integer", 3),
        ("size: 3\n    rate: 1e-3x", "numbered: rate='1e-3x': expected a number or null", 4),
    ],
)
def test_what_is_no_number_is_told_at_its_place(kind, arguments, message, line):
    with pytest.raises(ConfigError, match=message) as error:
        build(parse(f"x: 1\nmain: !{kind}:{HERE}:numbered\n    {arguments}\n"), allow=[f"{HERE}:numbered"])
    assert error.value.position.line == line
    assert error.value.key == f"main.{arguments.split(chr(10))[-1].partition(':')[0].strip()}"


def test_what_may_be_something_else_is_left_to_what_is_called():
    text = "main: !call:{}:numbered {{size: 3, sizes: [4], rate: ~, text: x}}"
    assert build(parse(text.format(HERE)), allow=[f"{HERE}:numbered"]) == (3, [4], None, "x")
    text = "main: !call:{}:sized {{size: x}}"  # whose annotations cannot be told
    assert build(parse(text.format(HERE)), allow=[f"{HERE}:sized"]) == ("x", [], None)
