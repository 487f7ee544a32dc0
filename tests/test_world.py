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


def failing_on(rank):
    world = here()
    with world.together():
        if world.rank == rank:
            raise KeyError("what")
    return


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
