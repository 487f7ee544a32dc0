"""The benchmark of pipelines runs, and knows of every schedule."""

import pytest

from benchmarks import pipeline
from forgather_fn.pipeline.schedules import KINDS


@pytest.fixture
def two_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "KINDS", {name: KINDS[name] for name in ("1f1b", "zbvzerobubble")})


def test_the_benchmark_runs(two_schedules: None) -> None:
    (table,) = pipeline.run(quick=True)
    assert [line[0] for line in table.lines] == ["1F1B", "ZBVZeroBubble"]
    for result in table.results:
        parts = result["parts"]
        assert 0 < parts["model"] <= parts["work"] < parts["schedule"] < parts["step"]
    assert "bubble" in table.text()
