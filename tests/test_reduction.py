import math

import pytest
import torch
from torch import distributed

from forgather_fn import parcel
from forgather_fn.reduction import Counter, Reduce, all_reduced, doubled
from forgather_fn.strategy.processes import joined
from forgather_fn.testing.processes import processes
from forgather_fn.world import World


def leaves(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(5, generator=generator) * 10.0**i for i in range(count)]


def in_pairs(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Add up as it is drawn: the left half of the next power of two, and the rest."""
    if len(tensors) == 1:
        return tensors[0]
    half = 1 << (len(tensors) - 1).bit_length() - 1
    return in_pairs(tensors[:half]) + in_pairs(tensors[half:])


@pytest.mark.parametrize("count", range(1, 18))
def test_a_counter_adds_aligned_pairs(count):
    counter = Counter()
    for leaf in leaves(count):
        counter.add([leaf])
    assert torch.equal(counter.total([])[0], in_pairs(leaves(count)))


def test_a_counter_leaves_alone_what_it_is_given():
    given = leaves(4)
    counter = Counter()
    for leaf in given:
        counter.add([leaf])
    counter.total([])
    assert all(map(torch.equal, given, leaves(4)))


def test_nothing_added_changes_no_number_not_even_the_sign_of_zero():
    (nothing,) = Counter().total([torch.zeros(2)])
    assert math.copysign(1, (torch.tensor([-0.0, 0.0]) + nothing)[0]) == -1


@pytest.fixture(scope="module")
def pools():
    with processes(2) as two, processes(4) as four:
        yield {2: two, 4: four}


def summed(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    world = joined(0)
    reduce: Reduce = doubled(world) if kind == "tree" else all_reduced(world)
    mine = leaves(world.size)[world.rank].clone()
    other = torch.full((3,), world.rank, dtype=torch.bfloat16)
    reduce([mine, other])
    return mine, other


@pytest.mark.parametrize("size", [2, 4])
def test_recursive_doubling_adds_aligned_pairs_everywhere(pools, size):
    for mine, other in pools[size].run(summed, "tree"):
        assert torch.equal(mine, in_pairs(leaves(size)))
        assert other.tolist() == [sum(range(size))] * 3


def test_the_ordinary_sum_is_alike_on_all_processes(pools):
    found = pools[4].run(summed, "sum")
    assert all(torch.equal(mine, found[0][0]) for mine, _ in found)
    assert torch.allclose(found[0][0], in_pairs(leaves(4)))


def test_a_tree_needs_a_power_of_two_of_processes():
    with pytest.raises(ValueError, match='not 3; use reduction="sum"'):
        doubled(World(size=3))


AWKWARD = [0.1, -0.0, math.inf, math.nan, 1e-310, 2.0**53 + 2, -1e300, 3.0]


def sent(dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Send numbers that no sum in a small data type would leave alone, from one process; flags from all."""
    world = joined(0)
    mine = torch.tensor(AWKWARD if world.rank == 1 else [-0.0] * len(AWKWARD), dtype=torch.float64)
    buffer = torch.ones(6, dtype=dtype)[:4]
    whole = parcel.behind(buffer, parcel.packed([world.rank == 0, True], mine, world, dtype))
    all_reduced(world)([whole])
    found = parcel.opened(whole[4:], 2, world)
    assert whole[:4].tolist() == [world.size] * 4
    return found.counts.tolist(), parcel.paired(found.rows).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 4])
def test_a_parcel_arrives_as_it_is(pools, size, dtype):
    for counts, numbers in pools[size].run(sent, dtype):
        assert counts == [1, size]
        assert str(numbers) == str(AWKWARD)


def added(rows: int) -> float:
    """Open what so many processes have sent."""
    world = World(size=rows)
    numbers = [leaf[:1].double() for leaf in leaves(rows)]
    parts = [parcel.packed([], number, World(rank, rows), torch.float32) for rank, number in enumerate(numbers)]
    return float(parcel.paired(parcel.opened(torch.stack(parts).sum(0), 0, world).rows))


@pytest.mark.parametrize("rows", range(1, 9))
def test_the_numbers_of_processes_are_added_in_aligned_pairs(rows):
    assert added(rows) == float(in_pairs([leaf[:1].double() for leaf in leaves(rows)]))


def test_a_parcel_lies_behind_its_buffer_where_there_is_room():
    buffer = torch.zeros(10)[:4]
    assert parcel.behind(buffer, torch.ones(6)).data_ptr() == buffer.data_ptr()
    assert parcel.behind(buffer, torch.ones(7)).data_ptr() != buffer.data_ptr()
    assert parcel.size(3, 2, 4) == len(
        parcel.packed([True] * 3, torch.zeros(2, dtype=torch.float64), World(size=4), torch.float32)
    )


def test_processes_that_are_alone_have_nothing_to_add():
    tensor = torch.ones(2)
    for reduce in (all_reduced(World()), doubled(World())):
        reduce([tensor])
    assert tensor.tolist() == [1, 1]
    assert not distributed.is_initialized()
