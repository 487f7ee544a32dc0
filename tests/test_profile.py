"""The stopwatch of the ``profile`` row: a line has its own time, and not that of the lines inside of it."""

import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from benchmarks import profile
from benchmarks.stopwatch import REST, Laps, Line, Stopwatch

ROOT = Path(__file__).parent.parent


@attrs.define(slots=False)
class Work:
    """Functions that take as long as they say, by a clock of their own."""

    time: float = 0.0

    def outer(self) -> None:
        self.time += 3.0
        self.inner()
        self.inner()

    def inner(self) -> None:
        self.time += 1.0


def test_a_line_has_its_own_time_and_the_rest_what_no_line_has() -> None:
    work = Work()
    watch = Stopwatch(now=lambda: work.time)
    outer, inner = watch.timed("outer", work.outer), watch.timed("inner", work.inner)
    object.__setattr__(work, "inner", inner)
    laps = Laps(watch, warmup=0)
    laps.lap()
    for extra in (5.0, 7.0, 9.0, 11.0):
        outer()
        inner()
        work.time += extra
        laps.lap()
    found = laps.profile([Line("outer", ()), Line("inner", ())])
    assert found.microseconds == {"outer": 3e6, "inner": 3e6, REST: 7e6}
    assert found.calls == {"outer": 1.0, "inner": 3.0, REST: 0.0}


@pytest.mark.parametrize(
    ("place", "owner", "name"),
    [
        ("forgather_fn.step:update_arrays", "forgather_fn.step", "update_arrays"),
        ("forgather_fn.workspace:workspace().clear", "forgather_fn.workspace", "workspace"),
    ],
)
def test_what_was_watched_is_put_back(place: str, owner: str, name: str) -> None:
    module = __import__(owner, fromlist=[name])
    before = getattr(module, name)
    with Stopwatch().watching([Line("one", (place,))]):
        assert getattr(module, name) is not before
    assert getattr(module, name) is before


def test_the_row_finds_all_its_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "profile", "--quick", "--json", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    results = [table["results"][0] for table in json.loads(path.read_text())["tables"]]
    shared = {line.what for line in profile.EAGER}  # of which several processes have their own in places
    given = [(arm.lines, shared if arm.processes > 1 else set()) for arm in profile.arms("aot_eager")]
    for result, (lines, spared) in zip(results, [*given, (profile.TRAINER, set())], strict=True):
        never = {line.what for line in lines if not result["calls"][line.what]} - spared
        assert not never, result["arm"]
