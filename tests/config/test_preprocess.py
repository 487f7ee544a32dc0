"""The preprocessor: each line statement, and what must not be taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.config import ConfigError, render
from forgather_fn.config.preprocess import preprocess, without_tail


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("-- set x = 1", "{% set x = 1 %}"),
        ("    -- set x = 1  ", "{% set x = 1 %}"),
        ("<< if x", "{%- if x %}"),
        (">> if x", "{% if x -%}"),
        ("  == x + 1", "{{ x + 1 }}"),
        ("=> a if b else c", "{{ (a if b else c)|trim('\\n') }}"),
        ("## gone", "{##}"),
        ("a: 1  ## tail", "a: 1"),
        ("-- set x = 1 ## tail", "{% set x = 1 %}"),
        ("--x", "--x"),
        ("---", "---"),
        ("- - a", "- - a"),
        ("==", "=="),
        ("<<: *base", "<<: *base"),
        ("a: [x]", "a: [x]"),
        ("[x, y]", "[x, y]"),
        ("[1]", "[1]"),
    ],
)
def test_a_line(source, expected):
    assert preprocess(source) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a: 'x ## y'", "a: 'x ## y'"),
        ('a: "x ## y" ## z', 'a: "x ## y"'),
        ('a: "x \\" ## y"', 'a: "x \\" ## y"'),
        ("a: 'it''s ## y'", "a: 'it''s ## y'"),
        ("a: it's ## y", "a: it's"),
        ("a: 'open ## y", "a: 'open"),
        ("a: x##y", "a: x##y"),
        ("a: {'b': ' ## '} ## c", "a: {'b': ' ## '}"),
        ("a: # one hash", "a: # one hash"),
    ],
)
def test_a_marker_in_quotes_is_text(line, expected):
    assert without_tail(line) == expected


def test_blocks_end_before_the_next_that_is_not_deeper_and_at_the_end():
    assert preprocess("[a]\nx\n  [b]\ny\n  [c]\nz\n[d!]\nw\n") == (
        "{% block a %}\nx\n{% block b %}\ny\n{% endblock b %}{% block c %}\nz\n"
        "{% endblock c %}{% endblock a %}{% block d %}{% filter trim %}\nw\n{% endfilter %}{% endblock d %}"
    )


def test_a_statement_that_ends_something_closes_the_blocks_in_it():
    assert render("-- if true\n[a]\nx: 1\n-- endif\ny: 2") == "x: 1\ny: 2"
    assert render("-- block outer\n[a]\nx: 1\n-- endblock outer\ny: 2") == "x: 1\ny: 2"


def test_a_file_without_a_last_line_end_does_not_swallow_what_follows(tmp_path):
    (tmp_path / "base.yaml").write_text("[a]\nx: 1\n[b]\ny: 2\n")
    assert render("-- extends 'base.yaml'\n[a]\nx: 3", [tmp_path]) == "x: 3\ny: 2\n"


@given(st.text(st.sampled_from("-=<>#[]{}%ab1'\"\\ \n!|:"), max_size=60))
def test_lines_stay_lines(source):
    assert 0 <= preprocess(source).count("\n") - source.count("\n") <= 1


def test_line_numbers_hold_behind_comments_and_statements():
    with pytest.raises(ConfigError, match="line 5") as error:
        render("## one\n-- set x = 1\n[a]\n== x\nb: {{ missing }}\n")
    assert error.value.position.text == "b: {{ missing }}"
