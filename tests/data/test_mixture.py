"""Mixtures: proportions, epochs of each source, curricula."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.data import mixing as module
from forgather_fn.data.mixing import WINDOW
from forgather_fn.data.weights import EVERY, apportioned, phases
from forgather_fn.testing import check_data
from tests.streams import ORDERS, Noise

SOURCES = {"code": range(7), "prose": range(100, 150), "maths": range(1000, 1013)}
WEIGHTS = {"code": 0.5, "prose": 0.2, "maths": 0.3}


def counts_of(stream: Any, start: int, stop: int, seed: int = 0) -> list[int]:
    _, indices = stream.indices(seed, start, stop)
    return np.bincount(stream.dataset.source_of(indices), minlength=len(stream.dataset.names)).tolist()


def mixed(weights: Any = WEIGHTS, **given: Any) -> Any:
    return ff.batches(ff.data.mixture(SOURCES, weights=weights), **{"batch_size": 8, **given})


@given(shares=st.lists(st.integers(0, 10**6), min_size=1, max_size=6).filter(any), total=st.integers(0, 10**15))
def test_shares_are_exact_and_never_fall(shares: list[int], total: int) -> None:
    one, other = apportioned(total, shares), apportioned(total + 1, shares)
    assert sum(one) == total
    assert sorted(after - before for before, after in zip(one, other, strict=True)) == [0] * (len(shares) - 1) + [1]
    for part, share in zip(one, shares, strict=True):
        assert abs(part * sum(shares) - total * share) <= len(shares) * sum(shares)


@pytest.mark.parametrize("stop", [WINDOW, 10 * WINDOW + 37, 10**12, 10**15 + 5])
def test_proportions_are_exact_at_any_position(stop: int) -> None:
    start = max(stop - 10 * WINDOW, 0)
    phase, _ = mixed().dataset.weights.at(stop)
    expected = np.subtract(phase.counts(stop // WINDOW * WINDOW), phase.counts(-(-start // WINDOW) * WINDOW))
    assert counts_of(mixed(), -(-start // WINDOW) * WINDOW, stop // WINDOW * WINDOW) == expected.tolist()
    for count, weight in zip(phase.counts(stop), WEIGHTS.values(), strict=True):
        assert abs(count - weight * stop) <= 3


@given(seed=st.integers(0, 2**40), order=st.sampled_from(ORDERS), start=st.integers(0, 3000), size=st.integers(0, 900))
@settings(max_examples=20)
def test_a_range_of_positions_is_a_slice_of_all(seed: int, order: Any, start: int, size: int) -> None:
    stream = mixed(order=order)
    for part, whole in zip(stream.indices(seed, start, start + size), stream.indices(seed, 0, 3900), strict=True):
        assert np.array_equal(part, whole[start : start + size])


@pytest.mark.parametrize("order", ORDERS)
def test_each_source_has_epochs_of_its_own(order: Any) -> None:
    stream = mixed(order=order)
    epochs, indices = stream.indices(3, 0, 2000)
    for part in stream.order.epoch_ranges(70):
        own = (indices >= part.start) & (indices < part.stop)
        found, of = indices[own], epochs[own]
        whole = len(found) // len(part) * len(part)
        assert np.array_equal(of, np.arange(len(of)) // len(part))
        for epoch in found[:whole].reshape(-1, len(part)):
            assert sorted(epoch) == list(part)
    check_data(stream, seed=3)


def test_places_are_shuffled_under_the_seed() -> None:
    sources = [mixed().dataset.source_of(mixed().indices(seed, 0, 2 * WINDOW)[1]) for seed in range(4)]
    assert len({tuple(found) for found in sources}) == 4
    for found in sources:
        ones, twos = found[:WINDOW], found[WINDOW:]
        assert not np.array_equal(ones, twos)
        # Neighbours are independent: the share of pairs of one source is the sum of squared weights.
        assert np.mean(ones[1:] == ones[:-1]) == pytest.approx(0.38, abs=0.06)


def places_by_start(self: Any, start: int, stop: int, seed: int) -> Any:
    """Plant: the places in a window depend on where the look-up began."""
    return RIGHT(self, start, stop, seed + start % 3)


RIGHT = module.Mixed._windows


def test_the_laws_catch_places_that_depend_on_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Mixed, "_windows", places_by_start)
    with pytest.raises(AssertionError):
        check_data(mixed(), seed=0)


def test_the_laws_catch_a_source_that_repeats_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeating(order: Any, start: int, stop: int, *, n: int, **given: Any) -> Any:
        epochs, indices = RIGHT_LOOK_UP(order, start, stop, n=n, **given)
        return epochs, np.minimum(indices, n - 2)

    monkeypatch.setattr(module, "look_up", repeating)
    with pytest.raises(AssertionError, match="is not a permutation: it gives sample 5 more than once"):
        check_data(mixed(), seed=0)


RIGHT_LOOK_UP = module.look_up


def test_a_curriculum_of_pieces_is_exact() -> None:
    stream = mixed({0: {"code": 1, "prose": 0, "maths": 0}, 100: WEIGHTS, 5000: {"code": 0, "prose": 1, "maths": 1}})
    assert counts_of(stream, 0, 100) == [100, 0, 0]
    assert counts_of(stream, 100, 5000) == [2450, 980, 1470]
    assert counts_of(stream, 5000, 5000 + 4 * WINDOW) == [0, 2 * WINDOW, 2 * WINDOW]
    check_data(stream)


def ramp(position: int) -> dict[str, float]:
    share = min(position / 20_000, 1.0)
    return {"code": 1 - share, "prose": share, "maths": 0.1}


def test_a_curriculum_may_be_a_function() -> None:
    stream = mixed(ramp)
    expected = np.zeros(3)
    for start in range(0, 30_000, EVERY):
        weights = np.array(list(ramp(start).values()))
        expected += weights / weights.sum() * (min(start + EVERY, 30_000) - start)
    assert np.abs(np.subtract(counts_of(stream, 0, 30_000), expected)).max() < 3 * 8 + 3
    later = mixed(ramp).indices(0, 25_000, 25_100)[1]
    assert np.array_equal(later, stream.indices(0, 0, 25_100)[1][25_000:])
    assert "test_mixture.ramp" in stream.fingerprint(0)


def test_a_function_of_weights_that_fails_is_asked_again_for_the_same_position() -> None:
    broken = True

    def weights(position: int) -> dict[str, float]:
        return {"code": 1.0} if broken and position == 2 * EVERY else ramp(position)

    stream = mixed(weights)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the weights at position {2 * EVERY} are of"):
            stream.indices(0, 0, 3 * EVERY)
    broken = False
    assert np.array_equal(stream.indices(0, 0, 3 * EVERY)[1], mixed(ramp).indices(0, 0, 3 * EVERY)[1])


def test_without_weights_shares_are_those_of_the_lengths() -> None:
    assert counts_of(mixed(None), 0, 70 * 1024) == [7 * 1024, 50 * 1024, 13 * 1024]


def test_weights_are_read_as_they_are_written() -> None:
    phase, _ = phases({"a": 0.1, "b": 0.2, "c": 1 / 3}, "abc").at(0)
    assert phase.shares == (3, 6, 10)


def test_samples_are_read_from_their_source_and_say_which_it_is() -> None:
    sources = {
        "columns": {"index": torch.arange(5), "square": torch.arange(5.0)[:, None] ** 2},
        "samples": [{"index": torch.tensor(i), "square": torch.tensor([float(i) ** 2])} for i in range(9)],
    }
    stream = ff.batches(ff.data.mixture(sources, label="source"), batch_size=7)
    for batch in itertools.islice(stream.start(0, 0), 20):
        assert batch.data["source"].tolist() == stream.dataset.source_of(batch.indices).tolist()
        assert batch.data["index"].tolist() == np.where(batch.indices < 5, batch.indices, batch.indices - 5).tolist()
        assert torch.equal(batch.data["square"][:, 0], batch.data["index"].float() ** 2)
    check_data(stream)


def test_draws_are_keyed_by_the_sample() -> None:
    class Other(Noise):
        pass

    sources = {"one": Noise(5), "other": Other(5)}
    check_data(ff.batches(ff.data.mixture(sources), batch_size=4, random=True))


def test_an_evaluation_gives_every_sample_once() -> None:
    found = [value for batch in mixed().one_pass() for value in batch.data.tolist()]
    assert found == [value for source in SOURCES.values() for value in source]


def test_another_mixture_is_another_stream() -> None:
    fingerprints = {
        mixed(weights, order=order).fingerprint(0)
        for weights in (WEIGHTS, None, {0: WEIGHTS, 10: {**WEIGHTS, "code": 1}})
        for order in ORDERS
    }
    assert len(fingerprints) == 9
    assert (
        "mixture(code=7, prose=50, maths=13, weights={code: 0.5, prose: 0.2, maths: 0.3}, shuffled)"
        in mixed().fingerprint(0)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": {}}, "at least one source"),
        ({"sources": {"a": []}}, "source 'a' is empty"),
        ({"sources": {"a": iter([1])}}, "cannot be indexed"),
        ({"sources": {"a": ff.data.mixture(SOURCES)}}, "'a' is a mixture itself"),
        ({"weights": {"code": 1}}, r"are of \['code'\]: expected one for each of \['code', 'maths', 'prose'\]"),
        ({"weights": {**WEIGHTS, "code": -1}}, "numbers of at least 0"),
        ({"weights": dict.fromkeys(WEIGHTS, 0)}, "not all of them 0"),
        ({"weights": {5: WEIGHTS}}, "with 0 for those that hold from the start"),
        ({"weights": lambda position: {"code": 1}}, "expected one for each"),
    ],
)
def test_what_is_no_mixture_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.data.mixture(**{"sources": SOURCES, **given})


def test_settings_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ValueError, match="sources of a mixture take 'shuffled'"):
        mixed(order=ff.data.by_length(range(70), group=4))
    labelled = ff.batches(ff.data.mixture(SOURCES, label="source"), batch_size=2)
    with pytest.raises(ValueError, match=r"label='source'.*Give samples that are mappings"):
        next(labelled.start(0, 0))
