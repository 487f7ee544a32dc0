import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from transformers import optimization

from forgather_fn import schedules as ff
from forgather_fn.schedules import Schedule, rate

PEAK, PAST = 3e-4, 60


Reference = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def followed(reference: Reference, steps: int) -> list[float]:
    """The rate of each update, in the order in which a loop calls the reference."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns of what it does itself
        scheduler = reference(optimizer)
        while len(rates) < steps - 1:
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return [*rates, float(optimizer.param_groups[0]["lr"])]


def hf(name: str, *args: Any, **kwargs: Any) -> Reference:
    return lambda optimizer: getattr(optimization, f"get_{name}")(optimizer, *args, **kwargs)


def pt(name: str, *args: Any, **kwargs: Any) -> Reference:
    return lambda optimizer: getattr(lr_scheduler, name)(optimizer, *args, **kwargs)


def pt_joined(*parts: Reference, milestone: int) -> Reference:
    return lambda optimizer: lr_scheduler.SequentialLR(optimizer, [part(optimizer) for part in parts], [milestone])


def values(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(step) for step in range(steps)]


DECAY: dict[str, Any] = {"peak": PEAK, "warmup": 7, "total": 37}
WSD: dict[str, Any] = {"peak": PEAK, "warmup": 5, "stable": 8, "decay": 12, "final": PEAK / 10}
HF_WSD: dict[str, Any] = {"num_stable_steps": 8, "min_lr_ratio": PEAK / 10 / PEAK}
HF_RESTARTS = "cosine_with_hard_restarts_schedule_with_warmup"
CURVES = {"cosine": ff.half_cosine, "linear": ff.straight, "1-sqrt": ff.one_minus_sqrt}
CYCLES: list[dict[str, Any]] = [
    {},
    {"pct_start": 0.45, "div_factor": 10.0, "final_div_factor": 7.0},  # its peak is between two steps
    {"pct_start": 0.02},  # too short to rise
    {"pct_start": 1.0},
]

# What ours is, the reference, and for how many steps the two agree.
EXACT = [
    (ff.constant(PEAK), hf("constant_schedule"), PAST),
    (ff.constant(PEAK, warmup=7), hf("constant_schedule_with_warmup", 7), PAST),
    (ff.linear(peak=PEAK, total=37), hf("linear_schedule_with_warmup", 0, 37), PAST),
    (ff.linear(**DECAY), hf("linear_schedule_with_warmup", 7, 37), PAST),
    (ff.linear(peak=PEAK, warmup=37, total=37), hf("linear_schedule_with_warmup", 37, 37), PAST),
    (ff.cosine(**DECAY), hf("cosine_schedule_with_warmup", 7, 37), 38),
    (ff.cosine(**DECAY, final=1e-5), hf("cosine_with_min_lr_schedule_with_warmup", 7, 37, min_lr=1e-5), 38),
    *((ff.cosine_with_restarts(**DECAY, cycles=n), hf(HF_RESTARTS, 7, 37, n), PAST) for n in (1, 3, 30)),
    (ff.inverse_sqrt(peak=PEAK), hf("inverse_sqrt_schedule", 0), PAST),
    (ff.inverse_sqrt(peak=PEAK, warmup=7), hf("inverse_sqrt_schedule", 7), PAST),
    (ff.inverse_sqrt(peak=PEAK, warmup=7, timescale=3), hf("inverse_sqrt_schedule", 7, 3), PAST),
    *(
        (ff.warmup_stable_decay(**WSD, curve=curve), hf("wsd_schedule", 5, 12, **HF_WSD, decay_type=name), PAST)
        for name, curve in CURVES.items()
    ),
    *(
        (ff.one_cycle(peak=PEAK, total=37, **more), pt("OneCycleLR", PEAK, 37, cycle_momentum=False, **more), 37)
        for more in CYCLES
    ),
    (
        ff.joined(ff.linear(peak=PEAK, total=9), ff.constant(PEAK, warmup=4), boundaries=[5]),
        pt_joined(hf("linear_schedule_with_warmup", 0, 9), hf("constant_schedule_with_warmup", 4), milestone=5),
        PAST,
    ),
]

# As above; here torch multiplies its way from step to step, and transformers divides by the peak and multiplies again.
ROUNDED = [
    (ff.linear(peak=PEAK, total=37, final=1e-5), pt("LinearLR", 1.0, 1e-5 / PEAK, 37), PAST),
    (ff.linear(**DECAY, final=1e-5), hf("polynomial_decay_schedule_with_warmup", 7, 37, 1e-5), PAST),
    (ff.cosine(peak=PEAK, total=37, final=1e-5), pt("CosineAnnealingLR", 37, 1e-5), 38),
    (ff.cosine_with_restarts(peak=PEAK, total=36, cycles=3), pt("CosineAnnealingWarmRestarts", 12), 36),
    (ff.polynomial(peak=PEAK, total=37, power=2.5), pt("PolynomialLR", 37, 2.5), PAST),
    (ff.polynomial(**DECAY, power=3, final=1e-7), hf("polynomial_decay_schedule_with_warmup", 7, 37, 1e-7, 3), PAST),
    (ff.piecewise(boundaries=[9, 20], values=[PEAK, PEAK / 10, PEAK / 100]), pt("MultiStepLR", [9, 20], 0.1), PAST),
    (
        ff.joined(PEAK * 0.5, ff.polynomial(peak=PEAK, total=20, power=2), boundaries=(10,)),
        pt_joined(pt("ConstantLR", 0.5, 1000), pt("PolynomialLR", 20, 2), milestone=10),
        PAST,
    ),
]


@pytest.mark.parametrize(("schedule", "reference", "steps"), EXACT, ids=[repr(case[0]) for case in EXACT])
def test_equals_its_reference_bit_for_bit(schedule: Schedule, reference: Reference, steps: int) -> None:
    assert values(schedule, steps) == followed(reference, steps)


@pytest.mark.parametrize(("schedule", "reference", "steps"), ROUNDED, ids=[repr(case[0]) for case in ROUNDED])
def test_equals_its_reference_to_rounding(schedule: Schedule, reference: Reference, steps: int) -> None:
    assert values(schedule, steps) == pytest.approx(followed(reference, steps), rel=1e-12, abs=1e-12 * PEAK)


peaks = st.floats(1e-6, 10.0)
shares = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
lengths = st.integers(1, 40)


@st.composite
def decays(draw: st.DrawFn) -> tuple[Schedule, float, float, int, int]:
    """A schedule that rises from 0, peaks and ends; with its peak, end, warm-up and total."""
    peak, total = draw(peaks), draw(lengths)
    warmup, final = draw(st.integers(0, total)), peak * draw(shares)
    shape: dict[str, Any] = {"peak": peak, "warmup": warmup, "total": total, "final": final}
    schedule = draw(
        st.one_of(
            st.just(ff.linear(**shape)),
            st.just(ff.cosine(**shape)),
            st.builds(lambda cycles: ff.cosine_with_restarts(**shape, cycles=cycles), st.integers(1, 5)),
            st.builds(lambda power: ff.polynomial(**shape, power=power), st.floats(0.1, 4.0)),
        )
    )
    return schedule, peak, final, warmup, total


@given(decays())
def test_a_decay_rises_from_nothing_peaks_stays_within_its_bounds_and_ends(decay: Any) -> None:
    schedule, peak, final, warmup, total = decay
    assert values(schedule, warmup) == pytest.approx([peak * step / warmup for step in range(warmup)], rel=1e-15, abs=0)
    if warmup < total:
        assert schedule(warmup) == peak
    low = final * (1 - 1e-15)  # final / peak * peak may round below final
    assert all(low <= schedule(step) <= peak for step in range(warmup, total + 5))
    assert [schedule(step) for step in (total, total + 1, 10**9)] == pytest.approx([final] * 3, rel=1e-15, abs=0)


# Steps of warm-up and decay are bounded by their slopes, and so there is no jump where they meet.
@given(peaks, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), shares)
def test_no_jump_where_phases_meet(peak: float, warmup: int, stable: int, decay: int, share: float) -> None:
    shape: dict[str, Any] = {"peak": peak, "warmup": warmup, "final": peak * share}
    slope = peak * max(1 / warmup, math.pi / 2 / decay) * (1 + 1e-9)
    for schedule in (
        ff.linear(**shape, total=warmup + decay),
        ff.cosine(**shape, total=warmup + decay),
        ff.warmup_stable_decay(**shape, stable=stable, decay=decay),
        ff.warmup_stable_decay(**shape, stable=stable, decay=decay, curve=ff.straight),
        ff.inverse_sqrt(peak=peak, warmup=warmup, timescale=decay),
    ):
        path = values(schedule, warmup + stable + decay + 5)
        assert max(abs(after - before) for before, after in itertools.pairwise(path)) <= slope


@given(peaks, st.integers(1, 40), shares, st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_one_cycle_stays_within_its_bounds_and_at_its_end(
    peak: float, total: int, pct_start: float, first: float, last: float
) -> None:
    cycle = ff.one_cycle(peak=peak, total=total, pct_start=pct_start, div_factor=first, final_div_factor=last)
    end = peak / first / last
    assert all(end * (1 - 1e-12) <= value <= peak * (1 + 1e-12) for value in values(cycle, total + 3))
    if pct_start < 1 and total > 1:
        assert [cycle(total - 1), cycle(total), cycle(10**9)] == [end] * 3


def test_one_cycle_that_has_no_rise_starts_at_its_peak() -> None:
    assert ff.one_cycle(peak=1.0, total=4, pct_start=0.25)(0) == 1.0  # where torch divides by zero
    assert ff.one_cycle(peak=1.0, total=1, pct_start=1.0)(0) == 1.0


@given(st.sampled_from([*EXACT, *ROUNDED]), st.permutations(range(45)))
def test_the_order_of_the_calls_does_not_matter(case: Any, order: list[int]) -> None:
    schedule = case[0]
    forward = values(schedule, 45)
    assert {step: schedule(step) for step in order} == dict(enumerate(forward))


@given(st.lists(decays(), min_size=3, max_size=3), lengths, lengths, st.integers(0, 200))
def test_joining_counts_from_the_boundary_and_is_associative(parts: Any, first: int, second: int, step: int) -> None:
    a, b, c = (part[0] for part in parts)
    whole = ff.joined(a, b, c, boundaries=(first, first + second))
    piece = a(step) if step < first else b(step - first) if step < first + second else c(step - first - second)
    assert whole(step) == piece
    assert whole(step) == ff.joined(a, ff.joined(b, c, boundaries=(second,)), boundaries=(first,))(step)
    assert whole(step) == ff.joined(ff.joined(a, b, boundaries=(first,)), c, boundaries=(first + second,))(step)
    assert ff.joined(a, boundaries=())(step) == a(step)


@given(decays(), decays(), lengths, shares, shares, st.integers(0, 80))
def test_scaling_multiplies_composes_and_goes_through_joining(
    one: Any, two: Any, at: int, x: float, y: float, step: int
) -> None:
    a, b = one[0], two[0]
    assert ff.scaled(a, factor=x)(step) == x * a(step)
    twice = ff.scaled(ff.scaled(a, factor=x), factor=y)
    assert twice(step) == pytest.approx(ff.scaled(a, factor=x * y)(step), rel=1e-15, abs=0)
    inside = ff.joined(ff.scaled(a, factor=x), ff.scaled(b, factor=x), boundaries=(at,))
    assert inside(step) == ff.scaled(ff.joined(a, b, boundaries=(at,)), factor=x)(step)


SHAPE: dict[str, Any] = {"peak": 1.0, "total": 10}
REFUSED: list[tuple[Callable[..., Schedule], dict[str, Any], str]] = [
    (ff.cosine, SHAPE | {"warmup": 11}, "warmup=11 is longer than total=10"),
    (ff.linear, SHAPE | {"final": 2.0}, "final=2.0 is above peak=1.0"),
    (ff.linear, SHAPE | {"total": 0}, "total=0: expected a plain, finite int, at least 1"),
    (ff.linear, SHAPE | {"peak": "1e-3"}, "linear: peak must be a number; got '1e-3'"),
    (ff.inverse_sqrt, {"peak": -1.0}, "peak=-1.0: expected a plain, finite float, at least 0"),
    (ff.inverse_sqrt, {"peak": 1.0, "timescale": 0}, "timescale=0: expected"),
    (ff.constant, {"value": math.inf}, "value=inf: expected"),
    (ff.constant, {"value": 1.0, "warmup": 0.1}, "constant: warmup must be an integer; got 0.1"),
    (ff.polynomial, SHAPE | {"power": 1.0, "warmup": True}, "polynomial: warmup must be an integer; got True"),
    (ff.polynomial, SHAPE | {"power": -0.5}, "power=-0.5: expected"),
    (ff.cosine_with_restarts, SHAPE | {"cycles": 0}, "cycles=0: expected"),
    (ff.warmup_stable_decay, WSD | {"decay": -1}, "decay=-1: expected"),
    (ff.warmup_stable_decay, WSD | {"curve": "cosine"}, r"curve must be a function \(Curve\); got 'cosine'"),
    (ff.warmup_stable_decay, WSD | {"curve": math.sqrt}, "curve=math.sqrt: expected a function that falls"),
    (ff.one_cycle, SHAPE | {"total": 0}, "total=0: expected"),
    (ff.one_cycle, SHAPE | {"pct_start": 1.5}, "pct_start=1.5: expected"),
    (ff.one_cycle, SHAPE | {"div_factor": 0.5}, "div_factor=0.5: expected"),
    (ff.piecewise, {"boundaries": (3,), "values": (1.0, math.nan)}, r"values\[1\]=nan: expected"),
    (ff.piecewise, {"boundaries": (0,), "values": (1.0, 2.0)}, r"boundaries\[0\]=0: expected"),
    (ff.piecewise, {"boundaries": (5, 5), "values": (1.0, 2.0, 3.0)}, r"boundaries=\(5, 5\): expected steps"),
    (partial(ff.joined, 1.0), {"boundaries": (3,)}, r"boundaries=\(3,\) make 2 pieces, but 1 were given"),
    (partial(cast(Any, ff.joined), 1.0, None), {"boundaries": (5,)}, "schedule None gave None at step 0"),
    (
        ff.scaled,
        {"schedule": "cosine", "factor": 2.0},
        r"schedule must be a function \(Schedule\) or a number; got 'cosine'",
    ),
    (ff.scaled, {"schedule": 1.0, "factor": -1.0}, "factor=-1.0: expected"),
]


@pytest.mark.parametrize(("factory", "arguments", "message"), REFUSED)
def test_refuses_at_construction(factory: Callable[..., Schedule], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


@pytest.mark.parametrize("curve", [ff.straight, ff.half_cosine, ff.one_minus_sqrt, ff.sqrt_of_rest, ff.wave(1.5)])
def test_going_along_a_curve_begins_at_the_start_ends_at_the_stop_and_stays(curve: ff.Curve) -> None:
    values = [rate(ff.along(curve, start=0.2, stop=0.8, steps=7), step) for step in range(12)]
    assert values[0] == pytest.approx(0.2)
    assert values[7:] == pytest.approx([0.8] * 5)
    assert 0.2 < values[3] < 0.8


def test_half_a_wave_is_half_a_cosine_and_a_whole_one_comes_back() -> None:
    shares = [step / 10 for step in range(11)]
    assert [ff.wave(0.5)(share) for share in shares] == [ff.half_cosine(share) for share in shares]
    assert ff.wave(1.0)(0.5) == pytest.approx(0.0)
    assert ff.wave(1.0)(1.0) == 1.0


def test_a_schedule_followed_ahead_is_itself_moved() -> None:
    linear = ff.linear(peak=1.0, warmup=3, total=9)
    assert [ff.ahead(linear, steps=2)(step) for step in range(12)] == [linear(step + 2) for step in range(12)]


def test_prints_as_its_call_and_compares_by_it() -> None:
    schedule = ff.scaled(ff.cosine(peak=1e-3, total=10), factor=0.5)
    text = "scaled(schedule=cosine(peak=0.001, warmup=0, total=10, final=0.0), factor=0.5)"
    assert repr(schedule) == text
    assert eval(text, vars(ff)) == schedule
    assert schedule != ff.scaled(ff.cosine(peak=1e-3, total=11), factor=0.5)


def test_boundaries_are_copied() -> None:
    boundaries, pieces = [2], [1.0, 0.5]
    stairs, both = ff.piecewise(boundaries=boundaries, values=pieces), ff.joined(1.0, 0.5, boundaries=boundaries)
    boundaries[0], pieces[1] = 1, 7.0
    assert values(stairs, 3) == values(both, 3) == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_rate_gives_a_float(number: Any) -> None:
    for schedule in (number, lambda step: number):
        value = rate(schedule, 3)
        assert value == 0.5
        assert type(value) is float
    assert type(rate(1, 0)) is float


NOT_ONE = [math.nan, -math.inf, "0.1", None, 1j, 10**400, np.ones(2), torch.ones(2), torch.tensor(1j)]


@pytest.mark.parametrize("value", NOT_ONE, ids=[type(value).__name__ for value in NOT_ONE])
def test_rate_refuses_what_is_not_one_finite_number(value: Any) -> None:
    def broken(step: int, /) -> Any:
        return value if step == 7 else 0.1

    assert rate(broken, 6) == 0.1
    with pytest.raises(ValueError, match=r"schedule .*\.broken gave .* at step 7: expected one finite number"):
        rate(broken, 7)
    with pytest.raises(ValueError, match="at step 3: expected one finite number"):
        rate(value, 3)


def test_rate_passes_on_the_error_of_a_schedule() -> None:
    def failing(step: int, /) -> float:
        raise ValueError("my own")

    with pytest.raises(ValueError, match=r"^my own$"):
        rate(failing, 0)
