"""Batches of samples of similar length."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.testing import check_data

LENGTHS = np.random.default_rng(0).geometric(0.02, 1000)


def padding(order: Any, batch_size: int = 8) -> float:
    """The share of a padded batch that is padding."""
    stream = ff.batches(LENGTHS, batch_size=batch_size, order=order, last="ragged", epochs=1)
    batches = [batch.data for batch in stream.start(0, 0)]
    return 1 - LENGTHS.sum() / sum(int(batch.max()) * len(batch) for batch in batches)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    group=st.integers(1, 7),
    groups=st.integers(1, 5),
    epoch=st.integers(0, 2**30),
    cut=st.integers(0, 60),
)
def test_each_epoch_is_a_permutation(lengths: list[int], group: int, groups: int, epoch: int, cut: int) -> None:
    n = len(lengths)
    stream = ff.batches(range(n), batch_size=1, order=ff.data.by_length(lengths, group=group, groups=groups))
    epochs, indices = stream.indices(7, epoch * n, (epoch + 1) * n)
    assert np.array_equal(np.sort(indices), np.arange(n))
    assert np.array_equal(epochs, np.full(n, epoch))
    middle = epoch * n + min(cut, n)
    parts = [stream.indices(7, epoch * n, middle)[1], stream.indices(7, middle, (epoch + 1) * n)[1]]
    assert np.array_equal(np.concatenate(parts), indices)


@pytest.mark.parametrize("last", ["span", "ragged", "drop"])
def test_it_is_an_order_like_any_other(last: Any) -> None:
    check_data(ff.batches(range(23), batch_size=4, last=last, order=ff.data.by_length(LENGTHS[:23], group=4, groups=3)))


def test_little_is_padded() -> None:
    grouped = padding(ff.data.by_length(LENGTHS, group=8))
    assert padding("shuffled") > 0.5
    assert grouped < 0.1


def test_lengths_do_not_fall_through_a_window() -> None:
    """In group_by_length of transformers they do: its longest batch is always the first."""
    order = ff.data.by_length(LENGTHS, group=8)
    stream = ff.batches(LENGTHS, batch_size=8, order=order)
    firsts = [LENGTHS[stream.indices(seed, 0, 400)[1]].reshape(50, 8).max(1).argmax() for seed in range(10)]
    assert len(set(firsts)) > 3
    means = LENGTHS[stream.indices(0, 0, 400)[1]].reshape(50, 8).mean(1)
    assert abs(np.corrcoef(np.arange(50), means)[0, 1]) < 0.4


def test_windows_are_those_of_a_shuffled_epoch() -> None:
    grouped = ff.batches(LENGTHS, batch_size=8, order=ff.data.by_length(LENGTHS, group=8)).indices(0, 0, 400)[1]
    assert sorted(grouped) == sorted(ff.batches(LENGTHS, batch_size=8).indices(0, 0, 400)[1])


def test_what_an_epoch_leaves_out_is_drawn_and_not_the_shortest() -> None:
    stream = ff.batches(range(11), batch_size=4, last="drop", order=ff.data.by_length(range(11), group=4, groups=3))
    left = [set(range(11)) - set(stream.indices(0, 8 * epoch, 8 * epoch + 8)[1].tolist()) for epoch in range(30)]
    assert sum(sum(out) for out in left) / 90 > 3.5  # of 0 to 10; the shortest are 0, 1 and 2


def test_other_lengths_are_another_order() -> None:
    orders = [ff.data.by_length(lengths, group=8) for lengths in (LENGTHS, LENGTHS[::-1])]
    one, other = (ff.batches(range(1000), batch_size=8, order=order).fingerprint(0) for order in orders)
    assert one != other
    assert "order=by_length(group=8, groups=50, lengths=" in one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group": 0}, "both must be at least 1"),
        ({"group": 2, "groups": 0}, "both must be at least 1"),
        ({"lengths": [[1, 2]], "group": 2}, "by_length: lengths must be integers of at least 0, one for each"),
    ],
)
def test_what_is_no_order_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.data.by_length(**{"lengths": [1, 2], **given})


def test_lengths_of_another_dataset_are_refused() -> None:
    with pytest.raises(ValueError, match="given 2 lengths, but the dataset has 5 samples"):
        next(ff.batches(range(5), batch_size=2, order=ff.data.by_length([1, 2], group=2)).start(0, 0))
