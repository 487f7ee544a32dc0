"""Which batches of a loader a process has, whatever the loader."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from forgather.ml.trainer.feed import feed, own_batches
from forgather.ml.trainer.sharing import Sharing
from forgather_fn.share import Share
from forgather_fn.world import World


class Numbers(Dataset):
    """Gives its indices, and with each what it draws."""

    read: list[int]

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return index, random.random(), np.random.random(), float(torch.rand(()))


class Line(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return ((i, 0.0, 0.0, 0.0) for i in range(self.count))


def shared(rank, size, microbatches):
    """A process that nobody answers: index algebra needs no one."""
    return Sharing(World(rank, size), Share(microbatches, rank, size), False)


def indices(batches):
    return [batch[0].tolist() for batch in batches]


@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 23, 24])
@pytest.mark.parametrize(("size", "microbatches"), [(1, 4), (2, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("data", [Numbers, Line])
def test_every_batch_is_one_process_of_its_window(count, size, microbatches, data):
    whole = indices(DataLoader(data(count), batch_size=3)) if count else []
    windows = [whole[i : i + microbatches] for i in range(0, len(whole), microbatches)]
    for skip in (0, microbatches):
        found = []
        for rank in range(size):
            loader = DataLoader(data(count), batch_size=3)
            share = Share(microbatches, rank, size)
            batches = indices(feed(loader, 1, shared(rank, size, microbatches)).open(0, skip))
            own = [window[share.block.start : share.block.stop] for window in windows[skip // microbatches :]]
            assert batches == [batch for block in own for batch in block]
            assert Sharing(World(rank, size), share).count(len(whole)) == sum(
                len(window[share.block.start : share.block.stop]) for window in windows
            )
            found += batches
        assert sorted(found) == sorted(whole[skip:])


def test_a_process_reads_only_what_is_its_own():
    data = Numbers(24)
    fed = feed(DataLoader(data, batch_size=3), 1, shared(1, 2, 4))
    assert len(list(fed.open(0, 4))) == 2
    assert sorted(data.read) == list(range(18, 24))


def test_what_a_batch_draws_depends_on_its_number_alone():
    def drawn(rank, size, epoch, skip):
        opened = feed(DataLoader(Numbers(24), batch_size=3), 1, shared(rank, size, 4)).open(epoch, skip)
        return [tuple(float(draws[0]) for draws in batch[1:]) for batch in opened]

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = [*drawn(0, 1, 0, 0), *drawn(0, 1, 1, 0)]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert len({number for batch in whole for number in batch}) == 3 * 16
    assert drawn(1, 2, 0, 0) == [*whole[2:4], *whole[6:8]]
    assert drawn(1, 2, 1, 4) == whole[14:16]


def test_a_part_of_an_evaluation_has_an_end():
    loader = DataLoader(Numbers(24), batch_size=3)
    for rank, expected in ((0, [[0, 1, 2], [6, 7, 8], [12, 13, 14]]), (1, [[3, 4, 5], [9, 10, 11]])):
        own, batches = own_batches(loader, 1, shared(rank, 2, 2), 5)
        assert len(own) == len(expected)
        assert indices(batches) == expected
