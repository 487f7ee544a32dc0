import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint, resume
from benchmarks.checkpoint import BESIDE, BLOCKED, FIRST, RESTORE, SAVED, STEP, TINY, TORCH, WRITTEN, Both
from benchmarks.resume import MADE, OURS, SAME, SKIPPED, WHOLE_OURS, WHOLE_SKIPPED
from benchmarks.table import Table
from benchmarks.turns import Spent, in_turns, timing
from forgather_fn.checkpoint import saved, saving
from forgather_fn.checkpoint.snapshot import snapshot
from forgather_fn.data import IndexedStream


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    held = Both(TINY, tmp_path)
    yield held
    held.close()


def arms(table: Table) -> set[str]:
    assert json.dumps(table.as_json())
    assert all(seconds > 0 for result in table.results for seconds in result["wall"])
    return {result["arm"] for result in table.results}


def test_the_checkpoint_row_runs() -> None:
    saves, loads, trained = checkpoint.run(quick=True)
    assert arms(saves) == {TORCH, BLOCKED, FIRST, WRITTEN, STEP, BESIDE}
    assert [(reach.what, reach.limit) for reach in saves.reach] == [(BLOCKED, 0.05), (WRITTEN, 0.8)]
    assert RESTORE in arms(loads)
    assert [(reach.what, reach.limit) for reach in loads.reach] == [(RESTORE, 1.0)]
    assert arms(trained) == {"no saves", SAVED, TORCH}


def test_the_resume_row_runs() -> None:
    small, large, whole = resume.run(quick=True)
    assert arms(small) == {MADE, SKIPPED, SAME, OURS}
    assert arms(large) == {SKIPPED, SAME, OURS}
    assert arms(whole) == {WHOLE_SKIPPED, WHOLE_OURS}
    assert all(reach.limit == 0.05 for table in (small, large, whole) for reach in table.reach)


def test_a_start_at_another_sample_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = IndexedStream.start
    monkeypatch.setattr(IndexedStream, "start", lambda stream, seed, samples: start(stream, seed, samples - 32))
    with pytest.raises(ValueError, match="the first batch is not the one that comes next"):
        list(resume.run(quick=True))


def test_the_states_that_are_compared_are_of_one_size(both: Both) -> None:
    both.torch_save()
    both.written()
    by_hand, ours = both.sizes()
    parameters = sum(tensor.numel() for tensor in both.state.params.values())
    assert by_hand == pytest.approx(12 * parameters, rel=0.01)
    assert ours == pytest.approx(12 * parameters, rel=0.01)


def slowly_copied(*given: Any) -> tuple[Any, Callable[[], None]]:
    taken, copied = snapshot(*given)

    def copy() -> None:
        time.sleep(0.6)
        copied()

    return taken, copy


def test_what_the_next_update_waits_for_counts_as_blocked(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "snapshot", slowly_copied)
    times = both.blocked()
    # The update waits for the 0.6 seconds, less those of the forward and backward pass that come before it.
    assert times[BESIDE].wall >= 0.5
    assert times[BLOCKED].wall > 0.1


def test_a_save_that_does_not_go_on_beside_counts_as_blocked(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "snapshot", slowly_copied)
    monkeypatch.setattr(checkpoint, "saved", functools.partial(saved, async_=False))
    assert both.first()[FIRST].wall >= 0.6


def test_every_save_of_the_row_is_a_new_checkpoint(both: Both) -> None:
    steps = []
    for arm in (both.written, both.blocked, both.written):
        arm()
        steps += [path.name for path in (both.run / "checkpoints").iterdir()]
    assert len(set(steps)) == len(steps) == 3


def test_arms_take_turns_and_parts_are_joined() -> None:
    seen: list[str] = []
    numbers = itertools.count(1)

    def arm(name: str) -> Mapping[str, Spent]:
        seen.append(name)
        return {name: Spent(wall=next(numbers), cpu=None if name == "b" else 0.5)}

    timed = in_turns([functools.partial(arm, name) for name in "abc"], rounds=2)
    assert "".join(seen) == "abcbca"
    assert timed["a"].as_json() == {"arm": "a", "wall": [1, 6], "cpu": [0.5, 0.5]}
    assert timed["b"].cpu == []


def test_a_block_is_timed_on_the_wall_and_by_its_work() -> None:
    with timing() as spent:
        time.sleep(0.05)
    assert spent.wall >= 0.05
    assert spent.cpu is not None
    assert spent.cpu < spent.wall
