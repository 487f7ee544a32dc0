"""The weights of a mixture, and how many samples they give each source up to any position."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, TypeAlias

import attrs

from forgather_fn.describe import describe

Weights: TypeAlias = Mapping[str, float]
"""A share for each source; only their ratios count."""

Curriculum: TypeAlias = Weights | Mapping[int, Weights] | Callable[[int], Weights]
"""Weights that stay, that hold from given positions on, or that are a function of the position."""

EVERY: Final = 4096
"""Samples for which weights that are a function of the position are held constant."""

_PRECISION: Final = 10**9
"""The largest denominator that a weight is read with: 0.3 is three tenths, as it is written."""


@attrs.frozen
class Phase:
    """A stretch of positions over which weights are constant.

    Attributes:
        start: The first position.
        shares: An integer for each source.
        before: How many samples of each source lie before the start.
    """

    start: int
    shares: tuple[int, ...]
    before: tuple[int, ...]

    def counts(self, position: int) -> tuple[int, ...]:
        """Count the samples of each source before a position that is in the phase, or ends it.

        Each count is exact integer arithmetic, never falls, and stays within as many samples as there are sources of
        its proportion; together they are the position.
        """
        return tuple(map(sum, zip(self.before, apportioned(position - self.start, self.shares), strict=True)))


def apportioned(total: int, shares: Sequence[int]) -> list[int]:
    """Split a number by shares: with each unit that it grows by, one part grows by one.

    Example:
        >>> apportioned(10, [1, 2, 4])
        [1, 3, 6]
    """
    left, parts = sum(shares), []
    for share in shares:
        part = total * share // left if left else 0
        parts.append(part)
        total, left = total - part, left - share
    return parts


@attrs.frozen(eq=False, repr=False)
class Phases:
    """All phases of a curriculum: found by bisection, those of a function as far as it was asked for."""

    description: str
    _phases: list[Phase]
    _shares_at: Callable[[int], tuple[int, ...]] | None = None

    def at(self, position: int) -> tuple[Phase, float]:
        """Find the phase of a position, and where it ends."""
        # Where a phase ends is known when the next begins.
        while self._shares_at is not None and (begun := self._phases[-1].start) <= position:
            self._begin(begun + EVERY, self._shares_at(begun + EVERY))
        number = bisect.bisect_right(self._phases, position, key=lambda phase: phase.start) - 1
        end = self._phases[number + 1].start if number + 1 < len(self._phases) else math.inf
        return self._phases[number], end

    def _begin(self, start: int, shares: tuple[int, ...]) -> None:
        self._phases.append(Phase(start, shares, self._phases[-1].counts(start)))

    def __repr__(self) -> str:
        return self.description


def phases(given: Curriculum, names: Sequence[str]) -> Phases:
    """Read the weights of a mixture.

    Args:
        given: See :data:`Curriculum`.
        names: Of the sources.

    Raises:
        ValueError: A source has no weight, a weight no source; one is negative, or all are zero; or no weights hold at
            position 0.
    """
    none = (0,) * len(names)
    if callable(given):
        function = given
        return Phases(
            describe(function),
            [Phase(0, _shares(function(0), names, 0), none)],
            lambda start: _shares(function(start), names, start),
        )
    if not any(isinstance(part, Mapping) for part in given.values()):
        return Phases(_text(given), [Phase(0, _shares(given, names, 0), none)])
    held: dict[Any, Any] = dict(given)
    if 0 not in held or not all(isinstance(start, int) and start >= 0 for start in held):
        raise ValueError(
            f"weights from positions {list(held)} on: expected integers, with 0 for those that hold from the start"
        )
    text = ", ".join(f"{start}: {_text(held[start])}" for start in sorted(held))
    found = Phases(f"{{{text}}}", [Phase(0, _shares(held.pop(0), names, 0), none)])
    for start in sorted(held):
        found._begin(start, _shares(held[start], names, start))
    return found


def _text(weights: Any) -> str:
    return "{" + ", ".join(f"{name}: {weights[name]!r}" for name in weights) + "}"


def _shares(weights: Any, names: Sequence[str], position: int) -> tuple[int, ...]:
    """Bring weights to integers of the same ratios."""
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        got = sorted(weights) if isinstance(weights, Mapping) else repr(weights)
        raise ValueError(f"the weights at position {position} are of {got}: expected one for each of {sorted(names)}")
    values = [weights[name] for name in names]
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values) or not any(values):
        raise ValueError(
            f"the weights at position {position} are {_text(weights)}: expected numbers of at least 0, not all of "
            "them 0"
        )
    exact = [Fraction(value).limit_denominator(_PRECISION) for value in values]
    common = math.lcm(*(value.denominator for value in exact))
    shares = [int(value * common) for value in exact]
    if not any(shares):
        raise ValueError(
            f"the weights at position {position} are {_text(weights)}: too small to tell apart; scale them"
        )
    return tuple(share // math.gcd(*shares) for share in shares)
