import itertools

import pytest
import torch

import forgather_fn as ff
from forgather_fn.batch import microbatches, owned
from forgather_fn.share import Microbatches, Share, cut


@pytest.mark.parametrize("samples", range(18))
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_cut_is_near_equal_and_loses_nothing(samples, count):
    parts = cut(samples, count)
    assert [row for part in parts for row in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert len(parts) == min(count, samples)
    assert not sizes or min(sizes) >= max(sizes) - 1 >= 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("samples", [1, 5, 8, 21])
def test_the_shares_of_all_processes_are_the_batch(samples, size):
    shares = [Share(8, rank, size).rows(samples) for rank in range(size)]
    assert list(itertools.chain(*shares)) == cut(samples, 8)


def test_microbatches_that_cannot_be_shared_out_are_refused():
    with pytest.raises(
        ValueError, match=r"microbatches=6 .* 4 processes; use a multiple, such as Plan\(microbatches=8\)"
    ):
        Share(6, 0, 4)


class Rows(torch.utils.data.Dataset):
    """Rows that remember who was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


def collated(rows):
    return torch.tensor(rows)


@pytest.mark.parametrize("last", ["span", "ragged", "drop"])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_process_reads_its_samples_and_no_others(last, workers):
    given = {"batch_size": 4, "last": last, "epochs": 3, "collate": collated, "workers": workers}
    whole = list(ff.batches(Rows(), **given).start(3, 0))
    datasets = [Rows(), Rows()]
    ranks = [list(ff.batches(rows, **given).start(3, 0, Share(4, rank, 2))) for rank, rows in enumerate(datasets)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        own = list(parts)
        assert [part.samples for part in own] == [batch.samples] * 2
        assert [part.ragged for part in own] == [batch.ragged] * 2
        assert [part.data.first for part in own] == [0, 2]
        together = [piece for part in own for piece in part.data.items]
        assert torch.equal(torch.cat(together), batch.data)
        assert all(map(torch.equal, together, microbatches(batch, 4)))
    if not workers:
        compared = ranks[0][0].data.items[0].tolist()  # the first microbatch, which the other process reads besides
        asked = [*datasets[0].asked, *datasets[1].asked]
        assert sorted(asked) == sorted([*compared, *(int(i) for batch in whole for i in batch.data)])


def test_a_share_starts_anywhere():
    stream, share = ff.batches(torch.arange(50), batch_size=8), Share(4, 1, 2)
    parts = [batch.data.items for batch in itertools.islice(stream.start(1, 0, share), 5)]
    later = [batch.data.items for batch in itertools.islice(stream.start(1, 16, share), 3)]
    assert all(
        torch.equal(*pair) for own, other in zip(parts[2:], later, strict=True) for pair in zip(own, other, strict=True)
    )


def test_owned_takes_whole_batches_and_parts_alike():
    batch = ff.Batch(torch.arange(7), 7, None)
    second = Share(4, 1, 2)
    expected = [(2, [4, 5]), (3, [6])]
    assert [(n, part.tolist()) for n, part in owned(batch, second)] == expected
    mine = ff.Batch(Microbatches((torch.tensor([4, 5]), torch.tensor([6])), 2), 7, None)
    assert [(n, part.tolist()) for n, part in owned(mine, second)] == expected
    nothing = ff.Batch(Microbatches((), 2), 2, None, ragged=True)
    assert owned(nothing, second) == []
    everything = ff.Batch(Microbatches(tuple(microbatches(batch, 4))), 7, None)
    assert [(n, part.tolist()) for n, part in owned(everything, second)] == expected


def test_passes_over_data_are_shared_out_batch_by_batch():
    stream = ff.batches(torch.arange(10), batch_size=3)
    first, second = ([batch.data.tolist() for batch in stream.one_pass(rank, 2)] for rank in (0, 1))
    assert (first, second) == ([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9]])


def drawn(rows):
    return torch.stack([row + torch.rand(()) for (row,) in rows])


def test_random_draws_do_not_depend_on_the_number_of_processes():
    dataset = torch.utils.data.TensorDataset(torch.arange(12.0))
    stream = ff.batches(dataset, batch_size=8, random=True, collate=drawn)
    (one,) = itertools.islice(stream.start(0, 0, Share(4)), 1)
    (two,) = itertools.islice(stream.start(0, 0, Share(4, 1, 2)), 1)
    assert all(map(torch.equal, one.data.items[2:], two.data.items))
    assert "microbatches=4" in stream.fingerprint(0, Share(4, 1, 2))
    assert stream.fingerprint(0, Share(4, 0, 2)) == stream.fingerprint(0, Share(4, 1, 4))
