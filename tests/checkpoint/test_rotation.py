import math
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.checkpoint import Best, Entry, Policy, superseded
from forgather_fn.checkpoint.manifest import Manifest
from forgather_fn.checkpoint.rotation import best_of

VALUES = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]), st.floats(allow_nan=True)
)
BEST = st.one_of(st.none(), st.builds(Best, st.just("eval_loss"), greater_is_better=st.booleans()))


def entry(number, *, loss=None, pinned=False, faults=(), ours=True, step=None):
    """Make the entry of the checkpoint that was committed as this number."""
    manifest = Manifest(
        step=number if step is None else step,
        samples=0,
        order=number,
        run="a",
        attempt="b",
        time=0.0,
        files={},
        metrics={} if loss is None else {"eval_loss": loss},
        pinned=pinned,
    )
    return Entry(Path(f"/run/checkpoint-{number}"), manifest.step, manifest if ours else None, tuple(faults))


@st.composite
def runs(draw):
    """Give checkpoints in the order of their commits: good ones, damaged ones, those of other tools."""
    kinds = draw(st.lists(st.tuples(VALUES, st.booleans(), st.sampled_from("gggdf"), st.integers(0, 9)), max_size=9))
    return [
        entry(number, loss=loss, pinned=pinned, step=step, faults=["damaged"] if kind == "d" else [], ours=kind != "f")
        for number, (loss, pinned, kind, step) in enumerate(kinds)
    ]


@st.composite
def cases(draw):
    entries = draw(runs())
    resumed = draw(st.one_of(st.none(), st.sampled_from([e.path for e in entries] or [None])))
    keep = draw(st.one_of(st.none(), st.integers(1, 4)))
    return entries, Policy(keep=keep, best=draw(BEST), resumed_from=resumed)


def usable(entries):
    return [e for e in entries if e.whole and e.manifest]


class TestWhatMayGo:
    @given(cases())
    def test_is_never_what_is_needed(self, case):
        entries, policy = case
        gone = superseded(entries, policy)
        for kept in usable(entries)[-(policy.keep or len(entries) or 1) :]:
            assert kept not in gone
        for e in gone:
            assert e.whole
            assert e.manifest is not None
            assert not e.manifest.pinned
            assert e.path != policy.resumed_from
        if policy.best and best_of(usable(entries), policy.best):
            assert best_of(usable(entries), policy.best) not in gone

    @given(cases())
    def test_is_everything_else(self, case):
        entries, policy = case
        stay = [e for e in usable(entries) if e not in superseded(entries, policy)]
        reasons = (policy.best is not None) + (policy.resumed_from is not None) + sum(e.manifest.pinned for e in stay)
        assert policy.keep is None or len(stay) <= policy.keep + reasons

    @given(cases())
    def test_is_nothing_more_after_it_is_gone(self, case):
        entries, policy = case
        gone = superseded(entries, policy)
        assert superseded([e for e in entries if e not in gone], policy) == []

    @given(cases(), st.randoms(use_true_random=False))
    def test_does_not_depend_on_what_is_damaged_or_of_other_tools(self, case, random):
        """They never count as kept, wherever they stand."""
        entries, policy = case
        expected = superseded(usable(entries), policy)
        others = [e for e in entries if e not in usable(entries)]
        mixed = list(usable(entries))
        for other in others:
            mixed.insert(random.randint(0, len(mixed)), other)
        assert superseded(mixed, policy) == expected

    def test_of_one_kept_and_a_damaged_newest_is_not_the_last_good_one(self):
        entries = [entry(0), entry(1), entry(2, faults=["damaged"])]
        assert superseded(entries, Policy(keep=1)) == [entries[0]]

    def test_goes_by_the_order_and_not_by_the_steps(self):
        entries = [entry(0, step=30), entry(1, step=10), entry(2, step=20)]
        assert superseded(entries, Policy(keep=1)) == entries[:2]

    def test_is_nothing_where_all_are_kept(self):
        assert superseded([entry(i) for i in range(5)], Policy()) == []


class TestTheBest:
    @given(runs(), st.booleans())
    def test_is_no_worse_than_any(self, entries, greater):
        found = best_of(entries, Best("eval_loss", greater_is_better=greater))
        values = [e.manifest.metrics["eval_loss"] for e in usable(entries) if "eval_loss" in e.manifest.metrics]
        values = [value for value in values if not math.isnan(value)]
        if found is None:
            assert values == []
        else:
            assert found.manifest.metrics["eval_loss"] == (max(values) if greater else min(values))

    @pytest.mark.parametrize(
        ("losses", "greater", "expected"),
        [
            ([0.3, 0.1, 0.2], False, 1),
            ([0.3, 0.1, 0.2], True, 0),
            ([0.1, 0.0, 0.2], False, 1),
            ([-0.1, 0.0, -0.2], True, 1),
            ([0.0, -0.0], False, 0),
            ([math.nan, 0.5, math.nan], False, 1),
            ([math.nan, 0.5, math.nan], True, 1),
            ([math.nan, math.nan], False, None),
            ([math.inf, math.nan], False, 0),
            ([0.2, 0.1, 0.1], False, 1),
            ([0.2, 0.2, 0.1], True, 0),
            ([None, None], False, None),
            ([None, 0.5], False, 1),
            ([], False, None),
        ],
    )
    def test_by_example(self, losses, greater, expected):
        entries = [entry(i, loss=loss) for i, loss in enumerate(losses)]
        found = best_of(entries, Best("eval_loss", greater_is_better=greater))
        assert found == (None if expected is None else entries[expected])

    def test_is_not_a_damaged_one(self):
        entries = [entry(0, loss=0.1, faults=["damaged"]), entry(1, loss=0.2)]
        assert best_of(entries, Best("eval_loss")) == entries[1]

    def test_is_by_the_metric_that_was_named(self):
        entries = [entry(0, loss=0.1), entry(1, loss=0.2)]
        assert best_of(entries, Best("accuracy")) is None


def test_a_policy_is_data():
    assert attrs.evolve(Policy(keep=3), keep=1) == Policy(keep=1)
