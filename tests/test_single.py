import logging

import pytest

from forgather_fn.strategy import single as module
from tests.toys import classifier, labelled_batches, program


@pytest.fixture(autouse=True)
def _anew():
    module._tell_of_others.cache_clear()
    yield
    module._tell_of_others.cache_clear()


@pytest.mark.parametrize(("size", "told"), [(None, 0), ("1", 0), ("2", 1)])
def test_where_a_launcher_has_started_several_each_says_once_that_it_trains_alone(monkeypatch, caplog, size, told):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with caplog.at_level(logging.WARNING, logger="forgather_fn"):
        for _ in range(2):
            made = program(classifier())
            state = made.init(0)
            assert not caplog.messages[told:]  # a program that does not train has nothing to tell
            assert [tick.state.step for tick in made.steps(state, labelled_batches(2))] == [1, 2]
    assert len(caplog.messages) == told
    assert all("2 processes" in text and "ff.accelerated(plan) trains one model" in text for text in caplog.messages)
