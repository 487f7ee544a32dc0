"""Law 4: a run that is saved, restored and continued is the run that was never interrupted."""

from typing import Any

import attrs
import pytest
import torch

import forgather_fn as ff
from forgather_fn.checkpoint import restoring, snapshot
from forgather_fn.testing import check_checkpoint, check_resume
from tests import zoo

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
def test_a_checkpoint_is_read_back_to_the_bit(name: str, storage: str) -> None:
    plan = zoo.plan_of(name, microbatches=2, average=ff.ema(0.9), viewed_elements=zoo.STORAGES[storage])
    check_checkpoint(plan, zoo.SPECIMENS[name].batch(5))


@pytest.mark.parametrize("optimizer", [ff.adamw(), ff.sgd(momentum=0.9), ff.from_torch(torch.optim.RMSprop)], ids=repr)
@pytest.mark.parametrize("name", ["dropout", "batchnorm", "intermittent", "reassigning"])
def test_a_run_may_be_left_at_any_step(name: str, optimizer: ff.Optimizer) -> None:
    plan = zoo.plan_of(name, optimizer=optimizer, microbatches=2, average=ff.ema(0.9), transforms=(ff.noise(0.1),))
    check_resume(plan, _stream(name), steps=5)


def _stream(name: str) -> ff.Stream:
    data: Any = zoo.SPECIMENS[name].batch(11)
    return ff.batches(data, batch_size=4)


def other_counters(patch: Patch) -> None:
    """The counters of updates start anew."""
    patch.setattr(restoring, "counter", lambda value, device: torch.tensor(min(value, 0)))


def off_by_one(patch: Patch) -> None:
    """The position in the data is saved before the step that consumed it."""
    taken = snapshot.snapshot

    def planted(state: Any, *rest: Any) -> Any:
        return taken(attrs.evolve(state, samples=max(state.samples - 4, 0)), *rest)

    patch.setattr("forgather_fn.checkpoint.saving.snapshot", planted)


def no_average(patch: Patch) -> None:
    """The average of the parameters starts anew from them."""
    arrays = restoring._arrays

    def planted(plan: Any, fresh: Any, loaded: Any, without: Any) -> Any:
        return arrays(plan, fresh, loaded, {*without, "ema"})

    patch.setattr(restoring, "_arrays", planted)


def no_buffers(patch: Patch) -> None:
    """Running statistics are those of a fresh model."""
    patch.setattr(restoring, "_buffers", lambda fresh, values, device: fresh)


@pytest.mark.parametrize("plant", [other_counters, off_by_one, no_average, no_buffers])
def test_a_planted_bug_is_caught(plant: Any, monkeypatch: Patch) -> None:
    plan = zoo.plan_of("batchnorm", average=ff.ema(0.5))
    check_resume(plan, _stream("batchnorm"), steps=3)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="resume: "):
        check_resume(plan, _stream("batchnorm"), steps=3)
