"""Streams: the laws of their order, their batches, their fingerprint, and what they refuse."""

import itertools
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

import forgather_fn.data.indexed
import forgather_fn.data.order
from forgather_fn.data import IndexedStream, batches
from forgather_fn.describe import describe
from tests.streams import LASTS, ORDERS, Noise, noisy, same, taken


def sequence(stream: IndexedStream, samples: int, count: int, seed: int = 0) -> list[int]:
    """The dataset indices at ``count`` positions, as the *data* shows them."""
    found: list[int] = []
    for batch in stream.start(seed, samples):
        assert batch.indices is not None
        assert batch.data.tolist() == batch.indices.tolist()
        assert batch.samples == len(batch.data)
        found += batch.data.tolist()
        if len(found) >= count:
            break
    return found[:count]


@given(
    order=st.sampled_from(ORDERS),
    n=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50) | st.integers(0, 2**40),
)
def test_each_epoch_is_a_permutation(order: Any, n: int, seed: int, epoch: int) -> None:
    epochs, indices = batches(torch.arange(n), batch_size=4, order=order).indices(seed, epoch * n, (epoch + 1) * n)
    assert np.array_equal(np.sort(indices), np.arange(n))
    assert np.array_equal(epochs, np.full(n, epoch))


@given(
    order=st.sampled_from(ORDERS),
    last=st.sampled_from(LASTS),
    n=st.integers(3, 20),
    batch_size=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 100), min_size=2, max_size=2).map(sorted),
)
def test_a_range_of_positions_is_a_slice_of_all(order: Any, last: Any, n: int, batch_size: int, cuts: Any) -> None:
    stream = batches(torch.arange(n), batch_size=batch_size, order=order, last=last)
    for part, whole in zip(stream.indices(5, *cuts), stream.indices(5, 0, 100), strict=True):
        assert part.dtype == np.int64
        assert np.array_equal(part, whole[slice(*cuts)])


def check_seeds_and_epochs_differ() -> None:
    # 50! orders: that two of these agree by chance does not happen.
    stream = batches(torch.arange(50), batch_size=1)
    orders = {tuple(stream.indices(s, e * 50, (e + 1) * 50)[1]) for s in range(8) for e in range(8)}
    assert len(orders) == 64


def check_starts_at_the_position() -> None:
    stream = batches(torch.arange(10), batch_size=4)
    whole = sequence(stream, 0, 40)
    for samples in range(30):
        assert sequence(stream, samples, 10) == whole[samples : samples + 10]


def test_seeds_and_epochs_differ() -> None:
    check_seeds_and_epochs_differ()


def test_start_at_any_sample_gives_the_tail() -> None:
    check_starts_at_the_position()


def test_the_laws_catch_seed_plus_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forgather_fn.data.order.shuffled
    monkeypatch.setitem(
        forgather_fn.data.order.ORDERS,
        "shuffled",
        lambda offsets, /, *, n, seed, epoch: right(offsets, n=n, seed=seed + epoch, epoch=0),
    )
    with pytest.raises(AssertionError):
        check_seeds_and_epochs_differ()


def test_the_laws_catch_a_start_that_is_one_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = IndexedStream.start
    monkeypatch.setattr(IndexedStream, "start", lambda self, seed, samples: right(self, seed, samples + (samples > 0)))
    with pytest.raises(AssertionError):
        check_starts_at_the_position()


def test_torch_order_is_that_of_transformers() -> None:
    stream = batches(torch.arange(11), batch_size=3, order="torch", last="ragged")
    for epoch in range(3):
        sampler = RandomSampler(range(11), generator=torch.Generator().manual_seed(42 + epoch))
        assert sequence(stream, epoch * 11, 11, seed=42) == list(sampler)


def test_sequential_order() -> None:
    assert sequence(batches(torch.arange(5), batch_size=2, order="sequential"), 3, 7) == [3, 4, 0, 1, 2, 3, 4]


@given(
    order=st.sampled_from(ORDERS),
    n=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=2),
    lasts=st.lists(st.sampled_from(["span", "ragged"]), min_size=2, max_size=2),
    samples=st.integers(0, 70),
)
def test_sequence_is_independent_of_batch_size(order: Any, n: int, sizes: Any, lasts: Any, samples: int) -> None:
    one, other = (
        batches(torch.arange(n), batch_size=size, order=order, last=last)
        for size, last in zip(sizes, lasts, strict=True)
    )
    expected = one.indices(3, samples, samples + 50)[1].tolist()
    assert sequence(one, samples, 50, seed=3) == sequence(other, samples, 50, seed=3) == expected


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("order", ORDERS)
def test_restart_at_any_batch_gives_the_tail(order: Any, last: Any) -> None:
    stream = batches(torch.arange(10), batch_size=4, order=order, last=last, epochs=4)
    whole = list(stream.start(9, 0))
    consumed = 0
    for k, batch in enumerate(whole):
        assert same(list(stream.start(9, consumed)), whole[k:])
        consumed += batch.samples
    assert consumed == stream.total_samples
    assert list(stream.start(9, consumed)) == []


@pytest.mark.parametrize(
    ("last", "epochs", "sizes", "epoch_length"),
    [
        ("span", None, [4, 4, 4, 4, 4, 4], 10),
        ("span", 2, [4, 4, 4, 4, 4], 10),
        ("span", 1, [4, 4, 2], 10),
        ("ragged", None, [4, 4, 2, 4, 4, 2], 10),
        ("ragged", 1, [4, 4, 2], 10),
        ("drop", None, [4, 4, 4, 4, 4, 4], 8),
        ("drop", 2, [4, 4, 4, 4], 8),
    ],
)
def test_sizes_of_batches(last: Any, epochs: int | None, sizes: list[int], epoch_length: int) -> None:
    stream = batches(torch.arange(10), batch_size=4, last=last, epochs=epochs)
    found = taken(stream.start(0, 0), 6)
    assert [batch.samples for batch in found] == sizes
    assert [batch.ragged for batch in found] == [size < 4 for size in sizes]
    assert stream.epoch_length == epoch_length
    assert stream.total_samples == (None if epochs is None else epochs * epoch_length)


def test_drop_uses_the_head_of_each_epoch() -> None:
    whole = batches(torch.arange(10), batch_size=4)
    found = sequence(batches(torch.arange(10), batch_size=4, last="drop"), 0, 24)
    assert found == [i for epoch in range(3) for i in whole.indices(0, epoch * 10, epoch * 10 + 8)[1]]


def test_batch_larger_than_the_dataset() -> None:
    (batch,) = taken(batches(torch.arange(3), batch_size=8, order="sequential").start(0, 1), 1)
    assert batch.data.tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    (batch,) = taken(batches(torch.arange(3), batch_size=8, order="sequential", last="ragged").start(0, 1), 1)
    assert batch.data.tolist() == [1, 2]
    assert batch.ragged


@pytest.mark.parametrize("block", [1, 5, 8192])
@pytest.mark.parametrize("last", LASTS)
def test_blocks_leave_no_trace(monkeypatch: pytest.MonkeyPatch, last: Any, block: int) -> None:
    stream = batches(torch.arange(20_000), batch_size=3000, last=last)
    small = batches(torch.arange(17), batch_size=4, last=last)
    monkeypatch.setattr(forgather_fn.data.indexed, "_BLOCK", block)
    assert sequence(stream, 6000, 30_000) == stream.indices(0, 6000, 36_000)[1].tolist()
    assert sequence(small, 12, 60) == small.indices(0, 12, 72)[1].tolist()


def test_start_far_into_a_job() -> None:
    stream = batches(torch.arange(1000), batch_size=4)
    (batch,) = taken(stream.start(0, 10**15 + 3), 1)
    assert batch.indices is not None
    assert batch.indices.tolist() == stream.indices(0, 10**15 + 3, 10**15 + 7)[1].tolist()


def test_a_stream_is_reusable() -> None:
    stream = batches(torch.arange(7), batch_size=3, order="torch")
    expected = sequence(stream, 0, 30)
    one, other = stream.start(0, 0), stream.start(1, 0)
    interleaved = [(next(one).data.tolist(), next(other)) for _ in range(10)]
    assert list(itertools.chain(*[found for found, _ in interleaved])) == expected


def test_seed_of_the_data() -> None:
    given, own = (batches(torch.arange(50), batch_size=5, seed=seed) for seed in (None, 3))
    assert sequence(own, 0, 50, seed=8) == sequence(own, 0, 50, seed=9) == sequence(given, 0, 50, seed=3)
    assert sequence(given, 0, 50, seed=8) != sequence(given, 0, 50, seed=9)
    assert sequence(batches(torch.arange(50), batch_size=5, seed=0), 0, 50, seed=8) == sequence(given, 0, 50, seed=0)
    assert sequence(given, 0, 50, seed=np.int64(8)) == sequence(given, 0, 50, seed=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", LASTS)
def test_one_pass(last: Any) -> None:
    stream = batches(torch.arange(10), batch_size=4, last=last, epochs=3)
    assert [batch.data.tolist() for batch in stream.one_pass()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    noise = batches(Noise(10), batch_size=4, last=last, random=True, seed=1)
    assert same(list(noise.one_pass()), list(noise.one_pass()))


def test_fingerprint_tells_what_decides_the_order() -> None:
    base: dict[str, Any] = {"dataset": range(10), "batch_size": 4}
    text = batches(**base).fingerprint(0)
    assert text == "data/1 length=10 order=shuffled last=span random=False seed=0"
    for change in (
        {"dataset": range(11)},
        {"order": "torch"},
        {"order": "sequential"},
        {"last": "ragged"},
        {"last": "drop"},
        {"random": True},
        {"seed": 1},
    ):
        assert batches(**base | change).fingerprint(0) != text, change
    for change in (
        {"workers": 2},
        {"prefetch": 5},
        {"pin_memory": True},
        {"batch_size": 5},
        {"epochs": 2},
        {"seed": 0},
    ):
        assert batches(**base | change).fingerprint(0) == text, change
    assert batches(**base).fingerprint(1) != text
    drop, keyed_collate = {"last": "drop"}, {"random": True, "collate": noisy}
    for joint in (drop, keyed_collate):
        assert batches(**base | joint).fingerprint(0) != batches(**base | joint | {"batch_size": 5}).fingerprint(0)
    assert "\n" not in text


def test_description_leaves_the_data_out() -> None:
    class Loud(list[int]):
        def __repr__(self) -> str:
            raise AssertionError("the text of a dataset may be endless")

    stream = batches(Loud([1, 2, 3]), batch_size=2, collate=noisy, seed=4)
    assert describe(stream) == repr(stream)
    assert repr(stream).startswith("batches(<Loud of 3 samples>, batch_size=2, order='shuffled', last='span', collate=")
    assert "streams.noisy" in repr(stream)
    assert repr(stream).endswith("workers=0, threads=0, prefetch=2, pin_memory=False, random=False, seed=4)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 2.0}, r"batches: batch_size must be an integer or a mapping .* got 2\.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, r"epochs must be an integer or None; got 1\.5"),
        ({"workers": -1}, "workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"order": "random"}, "order='random' is unknown: expected one of 'torch', 'shuffled', 'sequential'"),
        ({"last": "keep"}, "last='keep' is not one of 'span', 'drop', 'ragged'"),
        ({"last": "drop", "batch_size": 11}, "leaves nothing of 10 samples in batches of 11: .* last='span'"),
    ],
)
def test_refused_settings(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dataset": range(10), "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        batches(**given | arguments)


def test_refused_starts() -> None:
    stream = batches(range(10), batch_size=4, last="drop")
    with pytest.raises(ValueError, match="samples=-1"):
        stream.start(0, -1)
    with pytest.raises(ValueError, match="samples=6 lies inside a batch"):
        stream.start(0, 6)
    with pytest.raises(ValueError, match="from 4 to 3"):
        stream.indices(0, 4, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_changes_is_refused(workers: int) -> None:
    dataset = list(range(10))
    stream = batches(dataset, batch_size=2, workers=workers, prefetch=1)
    iterator = stream.start(0, 20)
    next(iterator)
    dataset.append(10)
    seen = 24 if workers else 22
    with pytest.raises(ValueError, match=f"has 11 samples, but had 10 .* at sample {seen} of the job"):
        taken(iterator, 5)
    assert multiprocessing.active_children() == []
