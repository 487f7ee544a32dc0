"""Replay: any step of a run, again, to the bit."""

import re

import pytest
import toolz

import forgather_fn as ff
from forgather_fn.checkpoint import CheckpointError, Replay, list_checkpoints, replay
from forgather_fn.cli import main
from tests.checkpoint.subjects import Everything, drawing, everything

STEPS, SAVED = 7, (3, 5)
EXACT = ("loss", "grad_norm", "learning_rate")


def noted(run):
    """Train and save; give what each step was, by its number."""
    program, seen = everything(), {}

    def note(tick):
        step = tick.state.step - 1
        seen[step] = [float(tick.metrics[name]) for name in EXACT], tuple(map(int, tick.batch.indices))

    toolz.pipe(
        program.steps(program.init(4), drawing()),
        ff.every(1, note),
        ff.at(SAVED, ff.saved(run, keep=None)),
        ff.until(steps=STEPS),
        ff.last,
    )
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("replayed")


@pytest.fixture(scope="module")
def seen(run):
    return noted(run)


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_every_step_is_that_of_the_run(run, seen, step):
    found = replay(everything(), run, drawing(), step=step)
    numbers = [found.metrics[name] for name in EXACT]
    origin = None if found.restored is None else int(found.restored.name.removeprefix("checkpoint-"))
    assert found.step == step
    assert origin == max((saved for saved in (*SAVED, STEPS) if saved <= step), default=None)
    if step < STEPS:
        assert (numbers, found.indices) == seen[step]
    assert {name for name in found.metrics if name.startswith("grad_norm/")} == {
        f"grad_norm/{name}" for name in everything().init(0).params
    }


def test_it_writes_nothing(run, seen):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    replay(everything(), run, drawing(), step=4)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_it_begins_where_the_nearest_whole_checkpoint_is(tmp_path):
    seen = noted(tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint-5" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = replay(everything(), tmp_path, drawing(), step=6)
    assert found.restored is not None
    assert found.restored.name == "checkpoint-3"
    assert found.metrics["loss"] == seen[6][0][0]


def test_the_first_values_of_an_instance_are_not_known(run, seen):
    with pytest.raises(CheckpointError, match="no whole checkpoint at step 2 or before"):
        replay(everything(model=Everything()), run, drawing(), step=2)


def test_a_stream_that_ends_before_is_refused(run, seen):
    with pytest.raises(ValueError, match="the stream ends before step 50"):
        replay(everything(), run, drawing(epochs=1), step=50)


def test_another_stream_is_refused(run, seen):
    with pytest.raises(ValueError, match="trained on another stream of data"):
        replay(everything(), run, drawing(order="sequential"), step=4)


def rebuilt(directory):
    """Make again what the run was made of, as ``forgather replay --program`` asks for it."""
    assert list_checkpoints(directory)
    return everything(), drawing()


PROGRAM = "tests.checkpoint.test_replaying:rebuilt"


@pytest.mark.parametrize(("step", "more"), [(4, 0), (STEPS, 0), (STEPS + 2, 2)])
def test_the_command_tells_what_the_step_was(run, seen, capsys, step, more):
    assert main(["replay", str(run), "--step", str(step), "--program", PROGRAM]) == 0
    out, err = capsys.readouterr()
    expected = replay(everything(), run, drawing(), step=step)
    assert isinstance(expected, Replay)
    assert out.startswith(
        f'step {step} (the {step + 1}th: it is reported in row "step": {step + 1} of metrics.jsonl), '
        f"from {expected.restored.name}\n"
    )
    assert f"  loss: {expected.metrics['loss']!r}\n" in out
    assert f"  samples: {' '.join(map(str, expected.indices))}\n" in out
    norms = [float(norm) for norm in re.findall(r"^ +(\S+)  \S+$", out.partition("largest first:")[2], re.MULTILINE)]
    assert norms == sorted(norms, reverse=True)
    assert len(norms) == len(everything().init(0).params)
    assert err == (f"after the newest checkpoint: {more} steps are executed first\n" if more else "")


@pytest.mark.parametrize("name", ["tests", "tests:nothing", "no.such:thing", ":"])
def test_a_program_that_cannot_be_found_is_told(run, seen, capsys, name):
    assert main(["replay", str(run), "--step", "4", "--program", name]) == 2
    assert f"--program {name}: expected MODULE:FUNCTION that can be imported" in capsys.readouterr().err
