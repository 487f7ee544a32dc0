import itertools

import pytest

from forgather_fn.pipeline.schedules import KINDS, Arrangement, ScheduleError, arrange, kind_of, orders
from forgather_fn.pipeline.simulation import picture, simulate

SIZES = [(ranks, held, number) for ranks in (1, 2, 3, 4) for held in (1, 2, 3) for number in range(1, 10)]


def fits(name: str, ranks: int, held: int, number: int) -> bool:
    try:
        arrange(name, ranks=ranks, stages=ranks * held, microbatches=number)
    except ScheduleError:
        return False
    return True


def runs(name: str, ranks: int, held: int, number: int) -> bool:
    """Ask torch's own class, and run the order that it makes."""
    kind = KINDS[name]
    if kind.stages == 1 and (held > 1 or (kind.fills and number < ranks)):
        return False  # torch's classes of one stage a rank are not asked: they have no stages to count
    try:
        order = orders(Arrangement(kind, ranks, ranks * held, number))
        simulate(order, ranks * held)
    except (ValueError, LookupError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("name", KINDS)
def test_what_is_refused_is_what_torch_cannot_run(name: str) -> None:
    assert [size for size in SIZES if fits(name, *size)] == [size for size in SIZES if runs(name, *size)]


@pytest.mark.parametrize("name", KINDS)
def test_each_stage_does_each_microbatch_once_forward_and_backward(name: str) -> None:
    held = KINDS[name].stages or 2
    arrangement = arrange(name, ranks=4, stages=4 * held, microbatches=8)
    order = orders(arrangement)
    for rank, actions in enumerate(order):
        assert len(set(actions)) == len(actions)
        assert {action.stage for action in actions} == set(arrangement.stages_of(rank))
        for stage, number in itertools.product(arrangement.stages_of(rank), range(8)):
            done = "".join(a.work for a in actions if (a.stage, a.microbatch) == (stage, number))
            assert done in ("FB", "FIW")


def test_placements() -> None:
    loop = arrange("Interleaved1F1B", ranks=2, stages=6, microbatches=4)
    v = arrange("DualPipeV", ranks=2, stages=4, microbatches=4)
    assert [loop.stages_of(rank) for rank in range(2)] == [(0, 2, 4), (1, 3, 5)]
    assert [v.stages_of(rank) for rank in range(2)] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("1F1B", (4, 4, 2), "with 4 stages needs at least 4 microbatches, not 2"),
        ("DualPipeV", (2, 4, 3), "needs at least 4 microbatches, not 3"),
        ("GPipe", (2, 4, 4), "needs 1 stage on each rank.*use 2 stages, or one of Interleaved1F1B"),
        ("ZBVZeroBubble", (2, 2, 4), "needs 2 stages on each rank.*use 4 stages, or one of GPipe, 1F1B"),
        ("Interleaved1F1B", (2, 4, 7), "in 3 rounds, which must be equal: use 6 or 8 microbatches"),
        ("1F1B", (2, 3, 4), r"3 stages cannot be spread evenly over 2 ranks: with 2 or 4 .*1 or 3 cuts"),
        ("bfs", (2, 2, 4), "'bfs' is not one of GPipe, 1F1B"),
    ],
)
def test_refusals_name_sizes_that_do(name: str, sizes: tuple[int, int, int], said: str) -> None:
    ranks, stages, number = sizes
    with pytest.raises(ScheduleError, match=said):
        arrange(name, ranks=ranks, stages=stages, microbatches=number)


def test_names_are_read_without_regard_to_case() -> None:
    assert kind_of("zbv") is kind_of("ZBVZEROBUBBLE") is KINDS["zbvzerobubble"]


def test_the_bubble_is_what_the_papers_say() -> None:
    # (p - 1) / (m + p - 1) for GPipe and 1F1B, (p - 1) / (v m + p - 1) interleaved.
    for name, held in (("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("LoopedBFS", 2)):
        arrangement = arrange(name, ranks=4, stages=4 * held, microbatches=8)
        assert simulate(orders(arrangement), 4 * held).bubble == pytest.approx(3 / (8 * held + 3))


def test_a_slow_stage_makes_the_others_wait() -> None:
    order = orders(arrange("1F1B", ranks=2, stages=2, microbatches=4))
    assert simulate(order, 2, costs=[1, 3]).bubble > simulate(order, 2).bubble


def test_the_picture() -> None:
    drawn = picture(simulate(orders(arrange("1F1B", ranks=2, stages=2, microbatches=3)), 2))
    assert drawn.splitlines() == ["rank 0  0 1 . . [0] 2 [1] . [2]", "rank 1  . 0 [0] 1 [1] 2 [2] . ."]
    v = picture(simulate(orders(arrange("ZBVZeroBubble", ranks=2, stages=4, microbatches=4)), 4), width=40)
    assert "i0'" in v
    assert max(map(len, v.splitlines())) <= 40
