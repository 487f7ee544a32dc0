"""The run: what it prints and writes, that it learns, and that the same seed gives the same bits."""

import contextlib
import hashlib
import io
import math
import re
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch

import forgather_fn as ff
from forgather_fn.control import Command, jobs
from forgather_fn.control.client import ask, target
from forgather_fn.demo import Settings
from forgather_fn.demo.train import bits_per_byte, fingerprint, prepare, readable, rebuilt, sample, train, versions
from forgather_fn.reports import read


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def settings(directory) -> Settings:
    path = directory / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, " for number in range(99, 0, -1)))
    return Settings(run=directory / "run", data=path, steps=21, width=16, layers=1, heads=2, context=16, batch_size=4)


def trained(settings: Settings) -> list[str]:
    """The lines that a run prints; what it returned is checked against the last one."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = train(settings)
    lines = out.getvalue().splitlines()
    assert lines[-1] == f"fingerprint: {found}"
    return lines


@pytest.fixture(scope="module")
def lines(settings) -> list[str]:
    return trained(settings)


def test_the_same_seed_gives_the_same_weights_and_the_same_sample(settings, lines, directory):
    again = trained(attrs.evolve(settings, run=directory / "again"))
    named = ("written to", "control ")  # lines that have the run's name
    told = [[line for line in of if not line.startswith(named)] for of in (again, lines)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"steps": 20},
        {"batch_size": 5},
        {"context": 15},
        {"width": 20},
        {"layers": 2},
        {"heads": 4},
        {"learning_rate": 3.1e-3},
    ],
)
def test_another_setting_gives_other_weights(settings, lines, tmp_path, changed):
    other = trained(attrs.evolve(settings, run=tmp_path, **changed))
    assert other[-1] != lines[-1]


def test_it_begins_with_the_text_and_the_model(settings, lines):
    assert lines[0].startswith(f"text   {settings.data}: ")
    ends, norms, attention, feed_forward = 2 * 256 * 16, 3 * 16, 4 * 16 * 16, 3 * 16 * 64
    assert lines[1] == f"model  {ends + norms + attention + feed_forward:,} parameters"


def test_evaluations_are_shown_at_the_first_step_and_the_last(lines, settings):
    shown = [re.fullmatch(r"step +(\d+)  (\d\.\d{3}) bits per byte", line) for line in lines]
    steps, bits = zip(*[(int(one[1]), float(one[2])) for one in shown if one], strict=True)
    assert steps == (1, settings.steps)
    assert bits[0] == pytest.approx(8, abs=0.1)  # nothing is known
    assert bits[1] < 7


def test_it_ends_with_what_the_fingerprint_depends_on_and_the_fingerprint(lines):
    assert re.fullmatch(
        r"python 3\.\d+\.\S+, torch \d\S+, forgather_fn \S.*, threads 1, device cpu, text [0-9a-f]{12}, step 21",
        lines[-2],
    )
    assert lines[-2].startswith(versions())
    assert re.fullmatch(r"fingerprint: [0-9a-f]{64}", lines[-1])


def test_the_run_directory_has_the_numbers_the_picture_and_the_events(settings, lines):
    rows = read(settings.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 10, 20, 21]
    assert ["eval_loss" in row for row in rows] == [True, False, False, True]
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["eval_loss"] / math.log(2))
    assert {"loss", "learning_rate", "grad_norm"} <= set(rows[0])
    picture = (settings.run / "curve.svg").read_text()
    assert "train loss" in picture
    assert "eval loss" in picture
    assert [path.stat().st_size > 500 for path in settings.run.glob("events.out.tfevents.*")] == [True]
    others = {path.name for path in settings.run.iterdir() if not path.name.startswith(("events.", "."))}
    assert others == {"metrics.jsonl", "curve.svg", "checkpoints", "run.json"}


def interrupted_at(step: int):
    """A user who presses Ctrl-C at an evaluation."""

    def show(tick: ff.Tick) -> None:
        if tick.state.step == step:
            signal.raise_signal(signal.SIGINT)

    return show


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(settings, lines, directory, monkeypatch, capsys):
    here = attrs.evolve(settings, run=directory / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("forgather_fn.demo.train.show", interrupted_at(1))
        with pytest.raises(KeyboardInterrupt, match="is saved at step 1; the same command goes on from there"):
            train(here)
    assert ", step 1\nfingerprint: " in capsys.readouterr().out
    finished = trained(here)
    assert finished[2] == f"found  {here.run} at step 1: going on from there (another --run starts anew)"
    assert finished[-2:] == lines[-2:]
    times = ("seconds", "samples_per_second", "tokens_per_second")
    rows, expected = [
        [{name: value for name, value in row.items() if name not in times} for row in read(run / "metrics.jsonl")]
        for run in (here.run, settings.run)
    ]
    assert rows == expected


def test_a_run_that_is_finished_stays_as_it_is(settings, lines, directory):
    here = attrs.evolve(settings, run=directory / "twice")
    trained(here)
    before = (here.run / "metrics.jsonl").read_bytes()
    assert trained(here)[-1] == lines[-1]
    assert (here.run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "holds a run with another seed; choose another directory with --run, or remove it"),
        ({"data": "other.txt"}, "holds a run with another text; choose another directory with --run, or remove it"),
        ({"width": 20}, "was made by another plan.*width=16.*width=20.*Choose another directory with --run"),
        ({"steps": 30}, "was made by another plan.*total=21.*total=30.*Choose another directory with --run"),
    ],
)
def test_a_run_of_other_settings_is_not_gone_on_with(settings, lines, directory, changed, message):
    (directory / "other.txt").write_text("another text " * 100)
    if "data" in changed:
        changed = {"data": directory / changed["data"]}
    before = {path: path.read_bytes() for path in settings.run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train(attrs.evolve(settings, **changed))
    assert {path: path.read_bytes() for path in settings.run.rglob("*") if path.is_file()} == before


def test_a_run_is_made_again_from_what_it_wrote_down(settings, lines):
    program, data = rebuilt(settings.run)
    state = ff.until(steps=settings.steps)(program.steps(program.init(settings.seed), data))
    assert lines[-1] == f"fingerprint: {fingerprint(ff.last(state).params)}"
    with pytest.raises(
        ValueError, match=r"cannot use '.*run\.json': No such file or directory; expected the run of a dem"
    ):
        rebuilt(settings.run.parent)


def test_it_learns(directory):
    path = directory / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz" * 200)
    settings = Settings(
        run=directory / "learned", data=path, steps=80, width=32, layers=1, heads=2, context=32, learning_rate=2e-2
    )
    lines = trained(settings)
    assert read(settings.run / "metrics.jsonl")[-1]["bits_per_byte"] < 0.3
    assert "klmnopqrstuvwxyzabcdefghij" in "".join(lines)


def test_nothing_global_is_changed(settings, directory):
    def observed() -> tuple[object, ...]:
        return (
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    before = observed()
    trained(attrs.evolve(settings, run=directory / "quiet", steps=2))
    assert observed() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": Path("nowhere")}, "cannot use 'nowhere': No such file or directory"),
        ({"width": 18}, "width=18 cannot be divided among heads=2"),
        ({"device": "cudo"}, "device 'cudo' cannot be used here"),
        ({"context": 4000}, "expected at least 8000, a window of context=4000 bytes"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(settings, directory, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(attrs.evolve(settings, run=directory / "untouched", **changed))
    assert not (directory / "untouched").exists()


def test_a_run_directory_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(ValueError, match=f"cannot use '{re.escape(str(path))}': {reason}; expected a directory"):
            prepare(path)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")  # as for all but root, who may write everywhere

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match=r"cannot use '.*': Permission denied; expected a directory that can be written"
    ):
        prepare(tmp_path)


def test_the_run_directory_is_looked_at_before_the_training(settings, capsys):
    with pytest.raises(ValueError, match="expected a directory that can be written to, or a new one"):
        train(attrs.evolve(settings, run=settings.data))
    assert capsys.readouterr().out == ""


def test_the_run_directory_is_made_with_its_parents_and_left_empty(tmp_path):
    prepare(tmp_path / "a" / "b")
    prepare(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_terminal_gets_a_bar_to_the_last_step(settings, directory, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    trained(attrs.evolve(settings, run=directory / "watched"))
    assert re.search(r"demo: 100%\|.*\| 21/21, loss \d", terminal.getvalue())


def test_bits_are_nats_over_the_logarithm_of_two():
    tick = SimpleNamespace(results={"eval_loss": math.log(256)})
    assert bits_per_byte(tick) == {"bits_per_byte": pytest.approx(8.0)}


def counting(seen: list[torch.Tensor]) -> SimpleNamespace:
    """A program whose model is sure that each byte is followed by the next number."""

    def apply(state: object, *, input_ids: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids)
        return torch.nn.functional.one_hot((input_ids + 1) % 256, 256) * 1e4

    return SimpleNamespace(apply=apply)


def test_a_sample_is_what_the_model_says_given_a_window_of_the_past():
    seen: list[torch.Tensor] = []
    written = sample(counting(seen), SimpleNamespace(seed=0), length=7, context=3)
    assert written == bytes(range(ord("\n") + 1, ord("\n") + 8))
    assert [one.tolist() for one in seen[:3]] == [[[10]], [[10, 11]], [[10, 11, 12]]]
    assert all(one.shape == (1, 3) for one in seen[2:])
    assert seen[-1].tolist() == [[14, 15, 16]]


def test_a_sample_is_drawn_under_the_seed_and_at_the_temperature():
    flat = SimpleNamespace(apply=lambda state, *, input_ids: torch.arange(256.0).expand(1, input_ids.shape[1], 256))

    def drawn(seed: int, temperature: float) -> bytes:
        return sample(flat, SimpleNamespace(seed=seed), length=40, context=3, temperature=temperature)

    before = torch.get_rng_state()
    assert drawn(0, 30.0) == drawn(0, 30.0) != drawn(1, 30.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn(0, 30.0))) > 20
    assert set(drawn(0, 0.01)) == {255}


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"def f():\n    pass\n", "def f():\n    pass\n"),
        ("größer → ok".encode(), "größer → ok"),
        (b"a\xffb\x1b[2Jc\td\0e\rf", r"a\xffb\x1b[2Jc\td\x00e\rf"),
    ],
)
def test_what_is_written_is_shown_without_harm_to_the_terminal(written, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8"))
    assert readable(written) == shown
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    assert readable(written) == shown.encode("ascii", "backslashreplace").decode()


def test_the_fingerprint_is_that_of_names_types_shapes_and_bytes_sorted():
    tensors = {"b": torch.tensor([1, 2]), "a.w": torch.tensor([[1.0, -2.0]])}
    content = b"a.w torch.float32 (1, 2)\n" + struct.pack("=2f", 1.0, -2.0)
    content += b"b torch.int64 (2,)\n" + struct.pack("=2q", 1, 2)
    assert fingerprint(tensors) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([2.0, 1.0])},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"w": torch.tensor([1.0, 2.0]), "x": torch.empty(0)},
        {"w": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0))},
    ],
)
def test_the_fingerprint_tells_all_else_apart(other):
    assert fingerprint(other) != fingerprint({"w": torch.tensor([1.0, 2.0])})


def test_the_fingerprint_reads_values_in_order_whatever_the_strides():
    matrix = torch.arange(6.0).view(2, 3)
    assert fingerprint({"w": matrix.t().contiguous().t()}) == fingerprint({"w": matrix})
    assert fingerprint({"w": torch.tensor(1.5)}) != fingerprint({"w": torch.tensor(2.5)})


def test_the_last_fingerprint_is_that_of_the_weights(settings, lines, monkeypatch, directory):
    kept = []

    def keeping(tensors):
        kept.append({name: tensor.clone() for name, tensor in tensors.items()})
        return fingerprint(tensors)

    monkeypatch.setattr("forgather_fn.demo.train.fingerprint", keeping)
    trained(attrs.evolve(settings, run=directory / "kept"))
    (weights,) = kept
    assert {name.split(".")[0] for name in weights} == {"embedding", "blocks", "norm", "head"}
    assert lines[-1] == f"fingerprint: {fingerprint(weights)}"


def test_what_is_held_out_is_evaluated_with_and_not_trained_on(settings, directory, monkeypatch):
    evaluated_with, evaluated = [], ff.evaluated

    def keeping(data: ff.Stream) -> object:
        evaluated_with.append(data)
        return evaluated(data)

    def seen(stream: ff.Stream) -> set[str]:
        return {chr(byte) for batch in stream.one_pass() for byte in batch.data["input_ids"].flatten().tolist()}

    path = directory / "two.txt"
    path.write_bytes(b"t" * 1520 + b"h" * 80)
    monkeypatch.setattr(ff, "evaluated", keeping)
    here = attrs.evolve(settings, data=path, run=directory / "held", steps=1)
    trained(here)
    assert [seen(stream) for stream in evaluated_with] == [{"h"}]
    assert seen(rebuilt(here.run)[1]) == {"t"}


def test_it_can_be_controlled_and_says_how(settings, tmp_path, monkeypatch):
    asked = []

    def show(tick):
        asked.append(ask(target(jobs.find("watched")), Command.STOP, wait=False))

    monkeypatch.setattr("forgather_fn.demo.train.show", show)
    told = trained(attrs.evolve(settings, run=tmp_path / "watched"))
    assert "control  forgather control watch watched  (in another terminal)" in told
    assert asked == [{"command": "stop", "accepted": True}]
    assert any(", step 1" in line for line in told)
    assert [path.name for path in (tmp_path / "watched" / "checkpoints").iterdir()] == ["checkpoint-1"]
