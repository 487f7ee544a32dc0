import pytest
import torch
from torch import distributed

from forgather_fn.testing.processes import ProcessesFailed, processes
from forgather_fn.world import ALONE, World


def here() -> World:
    return World(distributed.get_rank(), distributed.get_world_size(), control=distributed.group.WORLD)


def exchanged():
    world = here()
    return world.gather(world.rank * 10), world.broadcast(f"of {world.rank}"), world.beside().gather(world.rank)


def failing_on(rank: int) -> None:
    world = here()

    def fail() -> None:
        if world.rank == rank:
            raise KeyError("what")

    world.each(fail)


def on_the_first() -> tuple[str, list[int]]:
    world = here()
    return world.first(lambda: f"rank {world.rank}"), world.each(lambda: world.rank)


def polled() -> list[int]:
    """Give other numbers on each process, at other speeds."""
    agreed, rank = here().polled(), distributed.get_rank()
    return [agreed(number) for number in ([0, 3, 0, 0], [0, 5, 1, 0])[rank]]


def said(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def pair():
    with processes(2) as pool:
        yield pool


def test_objects_are_exchanged(pair):
    assert pair.run(exchanged) == [([0, 10], "of 0", [0, 1])] * 2


def test_one_process_is_its_own_world():
    assert (ALONE.gather(1), ALONE.broadcast(2), ALONE.beside(), ALONE.main) == ([1], 2, ALONE, True)


def test_what_fails_on_one_process_fails_on_all(pair):
    mine, others = pair.run(said, failing_on, 0)
    assert mine == "KeyError: 'what'"
    assert others == "PeerError: rank 0 failed: KeyError: 'what'"


def test_what_the_first_process_finds_all_know(pair):
    assert pair.run(on_the_first) == [("rank 0", [0, 1])] * 2


def test_a_poll_tells_all_the_same_one_call_later(pair):
    assert pair.run(polled) == [[0, 0, 5, 1]] * 2


def test_a_poll_of_one_tells_at_once():
    assert ALONE.polled()(3) == 3


def unlike(rank):
    if distributed.get_rank() == rank:
        raise KeyError("root")
    distributed.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pool_names_the_root_cause_first_and_starts_anew(pair, rank):
    with pytest.raises(ProcessesFailed) as caught:
        pair.run(unlike, rank)
    assert str(caught.value).startswith(f"rank {rank}:")
    assert "KeyError: 'root'" in caught.value.errors[rank]
    assert pair.run(distributed.get_rank) == [0, 1]
