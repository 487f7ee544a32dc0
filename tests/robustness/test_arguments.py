"""Arguments of public functions of types and values that nobody means: the error says what was given and expected."""

import math
import os

import pytest
from torch.optim import SGD

import forgather_fn as ff
from forgather_fn.checkpoint import list_checkpoints, load, load_weights, save, verify
from forgather_fn.checkpoint.catalog import latest
from forgather_fn.checkpoint.replaying import replay
from forgather_fn.cli import main
from forgather_fn.config import build, parse, render
from forgather_fn.control.inbox import Inbox
from forgather_fn.pipeline.schedules import kind_of
from tests.checkpoint.subjects import small, trajectory


@pytest.fixture(scope="module")
def program():
    made = small()
    made.init(0)
    return made


PATHS = [None, 3, b"", "", "a\0b", "\ud800", ["runs"]]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(
    "function",
    [
        lambda path, program: save(program, trajectory()[1], path),
        lambda path, program: load(path),
        lambda path, program: program.restore(path),
        lambda path, program: load_weights(trajectory()[1].copy(), path),
        lambda path, program: list_checkpoints(path),
        lambda path, program: latest(path),
        lambda path, program: verify(path),
        lambda path, program: ff.saved(path),
        lambda path, program: replay(program, path, [], step=0),
    ],
    ids=["save", "load", "restore", "load_weights", "list", "latest", "verify", "saved", "replay"],
)
def test_a_path_that_is_none(program, function, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = r"expected the path of a directory, got|has characters that no path has|must be a text or a path; got"
    with pytest.raises(ValueError, match=expected):
        function(path, program)
    assert not os.listdir(tmp_path)


COUNTS = [0, -1, 1.5, math.nan, math.inf, "3", True, [3]]


@pytest.mark.parametrize("count", COUNTS, ids=repr)
@pytest.mark.parametrize("name", ["keep", "failures"])
def test_a_count_that_is_none(name, count):
    with pytest.raises(ValueError, match=f"saved: {name} must be an integer.*; got"):
        ff.saved("run", **{name: count})


def served(**arguments):
    with ff.serve(**arguments):
        raise AssertionError("it was served")


OTHERS = {
    "a state that is none": (
        lambda p: save(p, None, "run"),
        "save takes a program, its state, and a run directory, in this order; got a Program and a NoneType",
    ),
    "arguments in another order": (
        lambda p: save(trajectory()[1], p, "run"),
        "in this order; got a TrainState and a Program",
    ),
    "weights for no state": (lambda p: load_weights("run", "run"), "takes a state, and the path of a checkpoint"),
    "select": (lambda p: load_weights(trajectory()[1].copy(), "run", select="body"), "expected a function of a name"),
    "allow None": (lambda p: p.restore("run", allow=None), "allow=None: expected a set of names out of"),
    "allow a number": (lambda p: p.restore("run", allow=[1, "x"]), "expected a set of names out of"),
    "allow a list": (lambda p: p.restore("run", without=[[]]), "expected a set of names out of"),
    "best": (lambda p: ff.saved("run", best=3), "best must be a text or None; got 3"),
    "the best of nothing": (lambda p: ff.saved("run", best=""), "best='', .*: expected the name of the result"),
    "a text for a truth": (
        lambda p: ff.saved("run", best="eval_loss", greater_is_better="no"),
        "greater_is_better must be True or False; got 'no'",
    ),
    "better, of no result": (
        lambda p: ff.saved("run", greater_is_better=True),
        "best=None, greater_is_better=True: expected the name of the result that is compared",
    ),
    "a text for a background": (lambda p: ff.saved("run", async_="no"), "async_ must be True or False; got 'no'"),
    "resumed_from": (lambda p: ff.saved("run", resumed_from=3), "resumed_from must be a text or a path or None; got 3"),
    "resumed from nothing": (lambda p: ff.saved("run", resumed_from=""), "resumed_from: expected the path of a dir"),
    "a step before the first": (lambda p: replay(p, "run", [], step=-1), "step=-1: the first step is 0"),
    "render None": (lambda p: render(None), "a template's text, name or path, got NoneType"),
    "render bytes": (lambda p: render(b"x"), "a template's text, name or path, got bytes"),
    "render in a text": (lambda p: render("x", search_path="abc"), "search_path='abc': expected a list of folders"),
    "render with a number": (lambda p: render("x", variables=3), "expected a mapping of names to values"),
    "parse None": (lambda p: parse(None), "parse takes text, such as render gives, got NoneType"),
    "parse bytes": (lambda p: parse(b"x: 1"), "parse takes text, such as render gives, got bytes"),
    "build text": (lambda p: build("main: 1"), "build takes a graph, .* got str, str,"),
    "build a list": (lambda p: build(parse("main: 1"), []), "build takes a graph, .* got Graph, list,"),
    "build with a number": (lambda p: build(parse("main: 1"), "main", 3), "got Graph, str, int"),
    "serve a number": (lambda p: served(run=3), "run=3: expected the path of a run directory"),
    "serve as a number": (lambda p: served(job_id=3), "job_id: expected str, or None; got 3"),
    "serve at a text": (lambda p: served(port="80"), "port: expected int, or None; got '80'"),
    "serve at true": (lambda p: served(port=True), "port: expected int, or None; got True"),
    "serve on a number": (lambda p: served(port=0, host=3), "host: expected str, or None; got 3"),
    "controlled by nothing": (lambda p: ff.controlled(None), "takes an inbox, as `with ff.serve"),
    "a command that is none": (lambda p: Inbox().post(3), "3 is not a command; there are save"),
    "half a step of lookahead": (lambda p: ff.optim.lookahead(ff.sgd(), steps=1.5), "steps must be an integer"),
    "lookahead of torch's": (lambda p: ff.optim.lookahead(SGD), "is not one of this library's optimizers"),
    "master weights of a number": (lambda p: ff.optim.master_weights(3), "3 is not one of this library's optimizers"),
    "a part without a match": (lambda p: ff.optim.partitioned({"a": ff.sgd()}), r"names to \(match, optimizer\)"),
    "a part of torch's": (lambda p: ff.optim.partitioned({"a": ("*", SGD)}), "part 'a': .* is not one of"),
    "half an iteration": (lambda p: ff.optim.orthogonal(iterations=2.5), "iterations must be an integer; got 2.5"),
    "a power that is none": (lambda p: ff.optim.schedule_free_adamw(power=math.nan), "powers must be at least 0"),
    "an eps that is none": (lambda p: ff.adamw(eps=math.nan), "eps at least 0, and finite; got"),
    "one group": (lambda p: ff.adamw(groups=ff.group("*")), "groups takes a sequence of them"),
    "a group by its pattern": (lambda p: ff.adamw(groups=["*"]), "groups takes a sequence of them"),
    "half an update": (lambda p: ff.swa(start=1.5), "swa: start must be an integer; got 1.5"),
    "half a bad step": (lambda p: ff.rollback(after=1.5, every=1), "rollback: after must be an integer; got 1.5"),
    "a number for a reducer": (lambda p: ff.folded("a", 3), "folded takes a name and a reducer"),
    "half a token": (lambda p: ff.data.packed([[1]], length=1.5), "packed: length must be an integer; got 1.5"),
    "one class": (
        lambda p: ff.losses.class_weighted(ff.losses.cross_entropy, 3),
        "a sequence, each a number; got 3",
    ),
    "a schedule that is none": (lambda p: kind_of(3), "schedule=3 is not one of GPipe"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_argument_that_is_none(program, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        call(program)


def test_a_token_is_not_in_a_message():
    with pytest.raises(ValueError, match="token: expected str, or None; got bytes") as caught:
        served(port=0, token=b"a-secret-of-some-length")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("split", ["-1", "1e999", "[]", "null", "{", "9" * 5000, "[" * 5000], ids=range(7))
def test_a_split_that_is_none(split, capsys):
    assert main(["pipeline", "explain", "config.json", "--split", split]) == 2
    assert "JSON" in capsys.readouterr().err
