"""The command line: one line for what a user can set right, exit codes, and nothing heavy before a command runs."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forgather_fn
from forgather_fn.cli import COMMANDS, main

PACKAGE = Path(forgather_fn.__file__).parent
TINY = ["--steps", "2", "--width", "8", "--layers", "1", "--heads", "2", "--context", "8", "--batch-size", "2"]


@pytest.fixture
def demo(tmp_path, monkeypatch) -> list[str]:
    """The arguments of a demonstration that takes no time, run where it may write."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one two three four five six seven\n" * 10)
    return ["demo", "--data", "text.txt", *TINY]


def test_a_demo_ends_well(demo, capsys):
    assert main(demo) == 0
    out, err = capsys.readouterr()
    assert re.search(r"\nfingerprint: [0-9a-f]{64}\n$", out)
    assert err == ""
    assert Path("runs/demo/curve.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data none", "cannot use 'none': No such file or directory; expected a file of text, or a folder of"),
        ("--data empty", "empty: 0 bytes of text (files: 1, left out as no text: 0); expected at least 16"),
        ("--data short", "short: 15 bytes of text (files: 1, left out as no text: 0); expected at least 16"),
        ("--data folder", "folder: 0 bytes of text (files: 0, left out as no text: 1); expected at least 16"),
        ("--width 10", "width=10 cannot be divided among heads=2: rotary positions turn pairs, so each head needs an"),
        ("--device gpu", "Plan: device 'gpu' cannot be used here: "),
        ("--device cuda:99", "Plan: device 'cuda:99' cannot be used here: "),
        ("--run text.txt", "cannot use 'text.txt': File exists; expected a directory that can be written to, or a new"),
        ("--run text.txt/run", "cannot use 'text.txt/run': Not a directory; expected a directory that can be"),
        ("--steps 0", "steps=0: expected an integer of at least 1"),
        ("--context 1", "context=1: expected an integer of at least 2"),
        ("--learning-rate nan", "learning_rate=nan: expected a positive, finite number"),
        ("--learning-rate 1e30 --steps 9", "step 1 (the 2nd): the loss or a gradient was not finite"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(demo, capsys, arguments, message):
    Path("empty").touch()
    Path("short").write_text("x" * 15)
    Path("folder").mkdir()
    Path("folder/image").write_bytes(b"\0" * 100)
    assert main([*demo, *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"forgather: error: {message}")
    assert err.count("\n") == 1


def test_debug_shows_where_an_error_arose(demo):
    with pytest.raises(ValueError, match="No such file or directory") as error:
        main([*demo, "--data", "none", "--debug"])
    assert any(entry.name == "read" for entry in error.traceback)


def test_an_error_of_the_programme_is_not_hidden(demo, monkeypatch):
    def broken(settings: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("forgather_fn.demo.train.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(demo)


@pytest.mark.parametrize(
    "arguments", [[], ["dmo"], ["demo", "--stepps", "3"], ["demo", "--step", "3"], ["demo", "--steps", "x"]]
)
def test_arguments_that_cannot_be_parsed_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: forgather")


def test_no_command_shows_them_all(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    err = capsys.readouterr().err
    assert all(summary in err for summary, _ in COMMANDS.values())


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["dmo"])
    assert "'dmo' is unknown: expected demo; forgather --help lists all" in capsys.readouterr().err


def test_a_missing_command_is_the_one_thing_that_is_missing(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["-t", "mine.yaml"])
    assert capsys.readouterr().err.endswith("the following arguments are required: COMMAND\n")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"forgather-fn \S.*\n", capsys.readouterr().out)


def test_the_exit_code_is_the_commands_own(monkeypatch):
    monkeypatch.setattr("forgather_fn.demo.command", lambda parser: lambda options: 7)
    assert main(["demo"]) == 7


def interrupting(times: int):
    """What shows an evaluation, and the Ctrl-C of a user who sees the first one."""

    def show(tick: object) -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    return show


def test_the_first_interrupt_ends_the_training_and_keeps_what_there_is(demo, capsys, monkeypatch):
    monkeypatch.setattr("forgather_fn.demo.train.show", interrupting(1))
    assert main([*demo, "--steps", "50"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: stopping after this step" in err
    assert err.endswith("forgather: interrupted: runs/demo is saved at step 1; the same command goes on from there\n")
    assert re.search(r", step 1\nfingerprint: [0-9a-f]{64}\n$", out)
    assert Path("runs/demo/curve.svg").exists()


def test_the_second_interrupt_ends_at_once(demo, capsys, monkeypatch):
    monkeypatch.setattr("forgather_fn.demo.train.show", interrupting(2))
    assert main([*demo, "--steps", "50"]) == 130
    out, err = capsys.readouterr()
    assert "fingerprint" not in out
    assert err.endswith("forgather: interrupted\n")


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_package_runs_as_a_module():
    done = python("-m", "forgather_fn", "demo", "--steps", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "forgather: error: steps=0: expected an integer of at least 1\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_of_itself(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: forgather {name} " in capsys.readouterr().out


def test_help_needs_nothing_heavy_and_tells_of_every_command():
    # The package itself imports torch; what is tested is that the command line adds nothing to it.
    done = python(
        "-c",
        f"""
import sys, types
package = types.ModuleType("forgather_fn")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["forgather_fn"] = package
from forgather_fn.cli import main
for arguments in (["--help"], ["demo", "--help"]):
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == 0
heavy = {{"torch", "numpy", "tqdm", "toolz", "accelerate"}} & set(sys.modules)
assert not heavy, heavy
""",
    )
    assert done.stderr == ""
    for name, (summary, _) in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(summary)}$", done.stdout, re.MULTILINE)
    assert "--learning-rate" in done.stdout
