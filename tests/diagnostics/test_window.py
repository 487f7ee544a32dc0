"""A profile and a recording of memory during some steps: exactly those, however the run ends."""

import contextlib
import json

import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.diagnostics import memory_recorded, profiled
from forgather_fn.diagnostics.window import during
from tests.toys import classifier, labelled_batches, program

ALL = 8


def run(*stages, start=0, count=ALL):
    made = program(classifier())
    state = made.init(0)
    batches = labelled_batches(ALL)
    for batch in batches[:start]:
        state, _ = made.step(state, batch)
    return toolz.pipe(made.steps(state, batches[start:count]), *stages, ff.last)


class Noting:
    """A context that notes when it is entered and left, and around which steps."""

    def __init__(self):
        self.seen = []

    def stage(self, start, steps):
        return during("noting", start, steps, self.begin, self.around)

    @contextlib.contextmanager
    def begin(self, device, rank):
        assert (str(device), rank) == ("cpu", 0)
        self.seen.append("begin")
        try:
            yield
        finally:
            self.seen.append("end")

    @contextlib.contextmanager
    def around(self, step):
        self.seen.append(step)
        yield

    def look(self, tick):
        self.seen.append(f"tick {tick.state.step}")


@pytest.mark.parametrize(
    ("start", "steps", "restored", "expected"),
    [
        (1, 1, 0, ["begin", 1, "end", "tick 1", "tick 2", "tick 3", "tick 4"]),
        (2, 2, 0, ["tick 1", "begin", 2, "tick 2", 3, "end", "tick 3", "tick 4"]),
        (2, 9, 0, ["tick 1", "begin", 2, "tick 2", 3, "tick 3", 4, "tick 4", 5, "end"]),
        (2, 2, 2, ["begin", 3, "end", "tick 3", "tick 4"]),
        (2, 1, 2, ["tick 3", "tick 4"]),
    ],
)
def test_it_lasts_for_the_steps_that_are_meant(start, steps, restored, expected):
    noting = Noting()
    run(noting.stage(start, steps), ff.every(1, noting.look), start=restored, count=4)
    assert noting.seen == expected


def test_it_ends_where_the_run_is_ended_or_fails():
    for ending in (ff.until(steps=3), ff.at(3, fail)):
        noting = Noting()
        with contextlib.suppress(RuntimeError):
            run(noting.stage(2, 5), ending)
        assert noting.seen == ["begin", 2, 3, "end"]


def fail(tick):
    raise RuntimeError("boom")


def test_a_run_that_ends_before_the_steps_is_told():
    with pytest.raises(ValueError, match="noting: the run ends at step 3, before step 5"):
        run(Noting().stage(5, 1), ff.until(steps=3))
    with pytest.warns(UserWarning, match="noting: the run ended at step 4, before step 5"):
        run(Noting().stage(5, 1), count=4)
    with pytest.warns(UserWarning, match="noting: the run ended at step 2, before step 5"):
        run(Noting().stage(5, 1), ff.stopped_by(lambda tick: tick.state.step == 2))


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (1, 0), (1.5, 1)])
def test_numbers_of_steps_are_checked(start, steps, tmp_path):
    for make in (profiled, memory_recorded):
        with pytest.raises(ValueError, match="must be an integer"):
            make(tmp_path, start=start, steps=steps)


def test_a_trace_has_the_steps_and_their_operations(tmp_path):
    final = run(profiled(tmp_path / "profile", start=3, steps=2, memory=True, shapes=True))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-3-4.rank-0.pt.trace.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {name for name in names if str(name).startswith("step ")} == {"step 3", "step 4"}
    assert "aten::addmm" in names
    assert "[memory]" in names
    assert ff.difference(final, run()) is None


def test_a_trace_is_written_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        run(profiled(tmp_path, start=2, steps=5), ff.at(3, fail))
    assert [path.name for path in tmp_path.iterdir()] == ["steps-2-6.rank-0.pt.trace.json"]


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot use '.*file'.*expected a directory"):
        run(profiled(tmp_path / "file", start=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA device")
def test_a_recording_of_memory_needs_a_cuda_device(tmp_path):
    with pytest.raises(
        ValueError, match=r"this run is on 'cpu'; ff\.diagnostics\.profiled\(directory, start=2, memory"
    ):
        run(memory_recorded(tmp_path, start=2))


@pytest.mark.gpu
def test_a_recording_of_memory_has_allocations(tmp_path):
    import pickle

    made = program(classifier(), device="cuda")
    toolz.pipe(made.steps(made.init(0), labelled_batches(4)), memory_recorded(tmp_path, start=2, steps=2), ff.last)
    snapshot = pickle.loads((tmp_path / "steps-2-3.rank-0.pickle").read_bytes())
    assert any(event["action"] == "alloc" for trace in snapshot["device_traces"] for event in trace)
