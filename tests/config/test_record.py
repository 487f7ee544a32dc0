"""Records: complete, read back, and without secrets; arguments by their paths."""

import json
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings

from forgather_fn.config import ConfigError, parse, render
from forgather_fn.config import record as records
from forgather_fn.config.arguments import arguments, differences, replaced
from forgather_fn.config.load import again
from forgather_fn.config.record import Record, content_hash, record_of
from forgather_fn.config.redact import REDACTED, redacted_command, redacted_text
from tests.config.graphs import graphs

TEMPLATE = """-- set hf_token = getenv('HF_TOKEN')
main: !call:dict
    hf_token: {{ hf_token | toyaml }}
    api_key: "sesame-open"
    pad_token: <pad>
    password: 12345678
    url: https://user:sesame-open@host/
    use_auth_token: true
    output: !var output_dir
    lr: 1e-3
    pin: !var {name: pin_secret, default: 77345}
-- if false
other_secret: &x never-shown
-- endif
# the password: hunter22
"""


def made(template: str = TEMPLATE, **changes: object) -> Record:
    text = render(template, environ={"HF_TOKEN": "hf_abcdef"})
    given: dict[str, object] = {
        "config": "mine.yaml",
        "variables": {"output_dir": "runs/mine", "wandb_key": "w4ndbk3y", "x": 1, "url": "https://w4ndbk3y@host"},
        "overrides": {"main.api_key": "sesame-open", "main.lr": "1e-3"},
        "command": [
            "forgather",
            "train",
            "--set",
            "main.api_key=sesame-open",
            "--wandb-key",
            "w4ndbk3y",
            "--lr",
            "1e-3",
        ],
        "folder": Path("/"),
    }
    return record_of(text, parse(text), **{**given, **changes})  # type: ignore[arg-type]


def test_a_record_is_read_back_as_it_was(tmp_path):
    record = made()
    records.write(tmp_path, record)
    assert records.read(tmp_path) == record
    assert records.read(tmp_path / "record.json") == record
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o600


def test_a_record_has_all_that_a_run_was_made_from():
    record = made("main: !call:dict {lr: 1e-3, x: !var x}\n")
    assert record.templates == {"<template>": "main: !call:dict {lr: 1e-3, x: !var x}\n"}
    assert record.rendered == "main: !call:dict {lr: 1e-3, x: !var x}\n"
    assert record.arguments == {"main": "!call:dict", "main.lr": 0.001, "main.x": 1}
    assert parse(record.graph) == parse(record.rendered)
    assert record.hash == content_hash(parse(record.graph))
    assert {"python", "torch", "platform", "threads"} <= set(record.versions)
    assert record.command[:2] == ["forgather", "train"]


@pytest.mark.parametrize(
    "secret", ["hf_abcdef", "sesame-open", "12345678", "w4ndbk3y", "never-shown", "hunter22", "77345"]
)
def test_no_secret_is_in_a_record(secret):
    record = attrs.asdict(made())
    del record["hash"], record["versions"]
    assert secret not in json.dumps(record, default=str)


def test_what_only_looks_like_a_secret_stays():
    record = made()
    assert record.arguments["main.pad_token"] == "<pad>"
    assert record.arguments["main.use_auth_token"] is True
    assert record.arguments["main.hf_token"] == REDACTED
    assert record.redacted
    assert not made("main: !call:dict {lr: 1}\n", variables={}, overrides={}, command=[]).redacted


def test_redacting_text_keeps_the_rest():
    text = "a: 1\nmy_key: 'x y' # why\n- {token: t, b: 2}\nssh-key=abc\nkeyboard: qwerty\ntoken_count: 5\n"
    assert redacted_text(text, []) == (
        "a: 1\nmy_key: <redacted> # why\n- {token: <redacted>, b: 2}\nssh-key=<redacted>\nkeyboard: qwerty\n"
        "token_count: 5\n"
    )
    assert redacted_command(["--api-key", "k", "--x", "y"], []) == ["--api-key", REDACTED, "--x", "y"]


def test_a_secret_has_to_be_given_again():
    with pytest.raises(ConfigError, match="was secret and is not in the record"):
        again(made(), {}, "runs/b")
    record = made("main: !call:dict {a_key: abcdef, b: !var x}\n")
    loaded = again(record, {"main.a_key": "abcdef"}, "runs/b")
    assert loaded.build("main", []) == {"a_key": "abcdef", "b": 1}


def test_a_record_is_kept_beside_one_of_another_content(tmp_path):
    first, second = made(config="a"), made(config="b")
    for record in (first, second, second):
        records.write(tmp_path, record)
    assert records.read(tmp_path) == second
    assert records.read(tmp_path / "record-1.json") == first
    assert not (tmp_path / "record-2.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(version=99), "version 99 of the schema"),
        (lambda fields: fields.update(format="x"), "is not a record"),
        (lambda fields: fields.pop("graph"), "lacks graph"),
        (lambda fields: fields.update(graph=fields["graph"].replace("0.001", "0.002")), "its graph was changed"),
        (lambda fields: fields.update(graph="x: ["), "not valid YAML"),
    ],
)
def test_a_record_that_was_changed_is_refused(tmp_path, change, message):
    path = records.write(tmp_path, made())
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        records.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a record of a run"):
        records.read(tmp_path)
    with pytest.raises(ConfigError, match="expected a run of forgather train"):
        records.read(tmp_path / "nowhere")


@given(graphs())
@settings(max_examples=50)
def test_arguments_of_equal_graphs_are_equal(graph):
    for target in graph.targets:
        assert differences(arguments(graph, target), arguments(graph, target)) == []


def test_differences_name_both_sides():
    old, new = (arguments(parse(f"main: !call:dict {text}")) for text in ("{a: 1, b: [2]}", "{a: 1.0, c: x}"))
    assert differences(old, new) == [("main.a", "1", "1.0"), ("main.b[0]", "2", "-"), ("main.c", "-", "'x'")]


GRAPH = "main: !call:dict {a: &a !call:dict {lr: 1, l: [1, 2]}, b: *a, d: {k: 1}, e: !call:list [5, 6]}\nx: 1"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("main.a.lr", "1e-3", {"main.a.lr": 0.001, "main.b.lr": 0.001}),
        ("main.a.l[1]", "x", {"main.a.l[1]": "x", "main.b.l[1]": "x"}),
        ("main.a.new", "[1]", {"main.a.new[0]": 1, "main.b.new[0]": 1}),
        ("main.d.k", "2", {"main.d.k": 2}),
        ("main.e[0]", "7", {"main.e[0]": 7}),
        ("main.d", "!call:list [3]", {"main.d": "!call:list", "main.d[0]": 3}),
        ("main", "3", {"main": 3}),
    ],
)
def test_an_argument_is_replaced_by_its_path(path, value, expected):
    before = arguments(parse(GRAPH))
    after = arguments(replaced(parse(GRAPH), path, value))
    assert {name: after[name] for name in expected} == expected
    untouched = {name for name in before if not any(name == at or name.startswith(path) for at in expected)}
    if path != "main":
        assert {name: after[name] for name in untouched - set(expected)} == {
            name: before[name] for name in untouched - set(expected)
        }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mian.a", "1", "mian.a is no path to an argument: did you mean main.a?"),
        ("main.aa.lr", "1", "main.aa.lr: there is no main.aa; did you mean a?"),
        ("main.d.kk", "1", "main.d.kk: there is no main.d.kk; did you mean k?"),
        ("main.a.l[7]", "1", "there is no main.a.l[7]"),
        ("main.a.lr.x", "1", "there is no main.a.lr.x; there are none"),
        ("main..a", "1", "main..a is no path"),
        ("main.a.lr", "[", "main.a.lr=[: not valid YAML"),
        ("main.a.lr", "!nothing 1", "main.a.lr=!nothing 1: unknown tag"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, value, message):
    with pytest.raises(ConfigError) as error:
        replaced(parse(GRAPH), path, value)
    assert message in str(error.value)
