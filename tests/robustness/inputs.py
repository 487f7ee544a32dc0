"""Inputs as nobody means them: JSON of any shape, text with bytes changed; and the running of a property over them."""

import json
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MANY: Final = 3000
"""Examples of a property in ``make soak``."""


def budget(examples: int) -> pytest.MarkDecorator:
    """Give a test the argument ``examples``: a few in ``make test``, and many in ``make soak``."""
    many = pytest.param(MANY, marks=[pytest.mark.soak, pytest.mark.timeout(3000)], id="many")
    return pytest.mark.parametrize("examples", [pytest.param(examples, id="few"), many])


def holds(check: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int) -> None:
    """Run a property over inputs, the same ones each time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    settings(max_examples=examples, suppress_health_check=quiet)(given(inputs)(check))()


NUMBERS: Final = (
    *(0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, True, False),
    *(0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 1e18),
)
TEXTS: Final = (
    "",
    "a",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "\0",
    "\ud800",
    "\udc80",
    "\x1b[2J",
    "é",
    "nan",
    "x" * 300,
)

numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS) | st.text(max_size=4)
leaves = st.none() | numbers | texts


def nested(depth: int, kind: str) -> Any:
    """Nest lists or mappings in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"mapping": value}
    return value


values = st.recursive(
    leaves | st.builds(nested, st.sampled_from([5, 400]), st.sampled_from(["list", "mapping"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Anything that JSON can say, and numbers that it cannot, most of all what is near a limit."""


def changed(record: Any) -> st.SearchStrategy[Any]:
    """Change one or two places of a JSON value: another value, nothing there, or something besides."""
    places = list(_places(record, ()))
    one = st.tuples(st.sampled_from(places), st.sampled_from(["put", "put", "drop", "add"]), texts, values)
    return st.lists(one, min_size=1, max_size=2).map(lambda edits: _edited(record, edits))


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _edited(record: Any, edits: list[tuple[tuple[Any, ...], str, str, Any]]) -> Any:
    found = {"top": json.loads(json.dumps(record))}
    for place, action, name, value in edits:
        *way, last = ("top", *place)
        inner: Any = found
        try:
            for key in way:
                inner = inner[key]
            if action == "drop" and place:
                del inner[last]
            elif action == "add" and isinstance(inner[last], dict):
                inner[last][name] = value
            else:
                inner[last] = value
        except (KeyError, IndexError, TypeError):  # an edit before has taken the place away
            continue
    return found["top"]


def as_bytes(value: Any) -> bytes:
    """Write JSON as Python does, with nan, infinities and surrogates that are no characters."""
    return json.dumps(value).encode()


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """Change bytes: flip bits, cut, repeat a part, put something between, or replace all."""
    places = st.integers(0, len(data))
    flips = st.lists(st.tuples(st.integers(0, max(len(data) - 1, 0)), st.integers(0, 7)), min_size=1, max_size=3)
    odd = st.sampled_from(
        [b"", b"\0", b"\n", b"\xff\xfe", b"{", b"}", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b'"', b"nan"]
    )
    return st.one_of(
        flips.map(lambda some: _flipped(data, some)),
        places.map(lambda stop: data[:stop]),
        st.tuples(places, odd | st.binary(max_size=8)).map(lambda one: data[: one[0]] + one[1] + data[one[0] :]),
        st.tuples(places, places, odd).map(lambda one: data[: min(one[:2])] + one[2] + data[max(one[:2]) :]),
        places.map(lambda start: data + data[start:]),
        odd | st.binary(max_size=64),
    )


def _flipped(data: bytes, flips: list[tuple[int, int]]) -> bytes:
    found = bytearray(data)
    for byte, bit in flips:
        if found:
            found[byte] ^= 1 << bit
    return bytes(found)
