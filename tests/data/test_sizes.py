"""Schedules of the batch size."""

import itertools
from typing import Any

import attrs
import pytest
import toolz
import torch
from hypothesis import given
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.data.sizes import rampup, sizes
from forgather_fn.share import Share
from tests.specimens import values

SCHEDULE = {0: 2, 2: 3, 4: 6}
GROWING = [2, 2, 3, 3, 6, 6, 6]


def as_function(step: int) -> int:
    return [size for first, size in SCHEDULE.items() if first <= step][-1]


@given(
    pieces=st.dictionaries(st.integers(1, 40), st.integers(1, 9), max_size=5),
    first=st.integers(1, 9),
    call=st.booleans(),
)
def test_every_boundary_is_where_the_batches_before_it_end(pieces: dict[int, int], first: int, call: bool) -> None:
    given = {0: first, **pieces}
    size_at = lambda step: given[max(known for known in given if known <= step)]  # noqa: E731
    schedule = sizes(size_at if call else given)
    position = 0
    for step in range(60):
        assert schedule.at(position) == size_at(step)
        for inside in range(1, size_at(step)):
            assert schedule.steps(position + inside) == step + 1
            with pytest.raises(ValueError, match=rf"inside a batch .* step {step} begins at {position}"):
                schedule.at(position + inside)
        assert schedule.steps(position) == step
        position += size_at(step)


@given(start=st.integers(1, 9), increment=st.integers(1, 7), times=st.integers(0, 6), samples=st.integers(0, 300))
def test_rampup_is_that_of_megatron(start: int, increment: int, times: int, samples: int) -> None:
    schedule = sizes(rampup(start=start, stop=start + times * increment, increment=increment, samples=samples))
    consumed = 0
    for _ in range(150):
        # megatron/core/num_microbatches_calculator.py: RampupBatchsizeNumMicroBatchesCalculator.update
        over = not times or consumed >= samples
        expected = start + (times if over else consumed * times // samples) * increment
        assert schedule.at(consumed) == expected
        consumed += expected


@pytest.mark.parametrize("schedule", [SCHEDULE, as_function], ids=["mapping", "function"])
def test_the_samples_are_those_of_any_other_batch_size(schedule: Any) -> None:
    stream = ff.batches(torch.arange(11), batch_size=schedule)
    batches = list(itertools.islice(stream.start(3, 0), 7))
    assert [batch.samples for batch in batches] == GROWING
    assert all(batch.varies and not batch.ragged for batch in batches)
    _, expected = ff.batches(torch.arange(11), batch_size=1).indices(3, 0, sum(GROWING))
    assert torch.cat([batch.data for batch in batches]).tolist() == expected.tolist()
    later = list(itertools.islice(stream.start(3, sum(GROWING[:3])), 4))
    assert all(torch.equal(one.data, other.data) for one, other in zip(batches[3:], later, strict=True))


def test_processes_share_each_batch_out() -> None:
    stream = ff.batches(torch.arange(11), batch_size=SCHEDULE)
    whole = [batch.data for batch in itertools.islice(stream.start(3, 0), 7)]
    ranks = [itertools.islice(stream.start(3, 0, Share(2, rank, 2)), 7) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([piece for part in parts for piece in part.data.items]), batch)


def test_until_knows_its_horizon() -> None:
    plan = ff.Plan(model=torch.nn.Linear(5, 3), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
    program = ff.single(plan)
    stream = ff.batches(values(11), batch_size=SCHEDULE)
    ticks = list(ff.until(epochs=2)(program.steps(program.init(0), stream)))
    assert len(ticks) == ticks[0].run.horizon == 6  # 2 + 2 + 3 + 3 + 6 + 6 of 22 samples
    bounded = ff.batches(values(11), batch_size=SCHEDULE, epochs=1)
    ticks = list(program.steps(program.init(0), bounded))
    assert [tick.batch.samples for tick in ticks] == [2, 2, 3, 3, 1]
    assert [tick.batch.ragged for tick in ticks] == [False] * 4 + [True]
    assert ticks[0].run.horizon == len(ticks) == bounded.count(0, 11)


def test_another_schedule_is_another_training() -> None:
    plan = ff.Plan(model=torch.nn.Linear(5, 3), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
    program = ff.single(plan)
    state = toolz.pipe(
        program.steps(program.init(0), ff.batches(values(11), batch_size=SCHEDULE)), ff.until(steps=2), ff.last
    )
    assert (state.samples, state.batch_size) == (4, "{0: 2, 2: 3, 4: 6}")
    other = ff.batches(values(11), batch_size={0: 2, 3: 4})
    with pytest.raises(ValueError, match=r"batch_size=\{0: 2, 2: 3, 4: 6\}, the stream has batch_size=\{0: 2, 3: 4\}"):
        program.steps(state, other)
    odd = attrs.evolve(state, batch_size=None, samples=5)
    with pytest.raises(ValueError, match="lies inside a batch"):
        next(iter(program.steps(odd, other)))


@pytest.mark.parametrize(
    ("batch_size", "last", "message"),
    [
        ({}, "span", r"first steps under"),
        ({1: 4}, "span", r"first steps under"),
        ({0: 4, 5: 0}, "span", "batch_size at step 5 is 0"),
        (SCHEDULE, "drop", "last='drop' with a schedule"),
        (SCHEDULE, "ragged", "use last='span'"),
        ("32", "span", "batch_size must be an integer or"),
    ],
)
def test_what_is_no_schedule_is_refused(batch_size: Any, last: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.batches(range(10), batch_size=batch_size, last=last)


def test_a_batch_needs_a_sample_for_each_microbatch() -> None:
    plan = ff.Plan(model=torch.nn.Linear(5, 3), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1, microbatches=3)
    program = ff.single(plan)
    with pytest.raises(ValueError, match=r"microbatches=3, but batch_size=\{0: 2"):
        program.steps(program.init(0), ff.batches(values(11), batch_size=SCHEDULE))
    with pytest.raises(ValueError, match="microbatches=3, but the batch has 2 samples"):
        next(ff.batches(values(11), batch_size=as_function).start(0, 0, Share(3)))
    with pytest.raises(ValueError, match="microbatches=3, but the batch has 2 samples"):
        next(ff.batches(lambda: iter(range(11)), batch_size=2, order="sequential").start(0, 0, Share(3)))
    with pytest.raises(ValueError, match="microbatches=3, but the batch has 2 samples"):
        list(program.steps(program.init(0), ff.batches(values(11), batch_size=as_function, epochs=1)))


def test_a_function_that_fails_is_asked_again_for_the_same_step() -> None:
    found: dict[int, Any] = {0: 2, 1: "three"}
    stream = ff.batches(values(11), batch_size=lambda step: found[step])
    for _ in range(2):
        with pytest.raises(ValueError, match="batch_size at step 1 is 'three': expected an integer"):
            list(stream.start(0, 0))
    del found[1]
    with pytest.raises(KeyError):
        list(stream.start(0, 0))
    found |= {1: 4, 2: 1}
    batches = stream.start(0, 0)
    assert [next(batches).samples for _ in range(3)] == [2, 4, 1]
