"""What the source of a stream and its stages tell each other: what is wanted, where it stands, and how it went."""

import contextlib
import difflib
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator

import attrs

from forgather_fn.reducers import Control
from forgather_fn.state import TrainState


@attrs.define(eq=False)
class Course:
    """Where an open stream stands: the one thing that stages may replace between two steps.

    Attributes:
        state: What the next step consumes.
        controls: What is made of results as they are found; see :class:`~forgather_fn.reducers.Control`.
        found: The names of all results so far, and what found each the last time.
        ended: What observers have found at the end of the stream, when nothing reacts to it any more.
        metrics: Of the newest step, by name.
        waiting: What has had nothing of its result so far, in this stream or before: its name, and the result's.
    """

    state: TrainState
    controls: tuple[Control, ...]
    found: dict[str, object] = attrs.field(factory=dict)
    ended: dict[str, float] = attrs.field(factory=dict)
    metrics: Collection[str] = ()
    waiting: dict[str, str] = attrs.field()

    @waiting.default
    def _begun(self) -> dict[str, str]:
        kept = self.state.controls
        return {one.name: one.metric for one in self.controls if kept.get(one.name) in (None, one.reducer.init())}


@attrs.define(eq=False)
class Outcome:
    """How a stream went.

    Attributes:
        course: Where it stands; None before it has begun.
        exhausted: Whether the data have ended, and nothing else has ended it before.
    """

    course: Course | None = None
    exhausted: bool = False


@attrs.frozen(eq=False)
class Demand:
    """What stages downstream ask of the source, before it runs.

    Attributes:
        wants: For each observer, ``step -> names``: what it wants of the step that leads to that number.
        horizon: The step at which the stream will end, if known.
        controls: What is to be made of results where they are found, so that whatever saves after that saves it too.
        kept: Under which names stages keep something in the state's ``controls``.
        outcome: Where the source says how it went; one for all stages of a stream.
    """

    wants: tuple[Callable[[int], frozenset[str]], ...] = ()
    horizon: int | None = None
    controls: tuple[Control, ...] = ()
    kept: frozenset[str] = frozenset()
    outcome: Outcome = attrs.field(factory=Outcome)

    def at(self, step: int) -> frozenset[str]:
        """Join what all observers want of the step that leads to this number."""
        return frozenset(itertools.chain.from_iterable(want(step) for want in self.wants))

    def wanting(self, wants: Callable[[int], frozenset[str]]) -> "Demand":
        """Add an observer's wants."""
        return attrs.evolve(self, wants=(*self.wants, wants))

    def keeping(self, control: Control) -> "Demand":
        """Add what a stage makes of results.

        Raises:
            ValueError: Another stage keeps something under the same name.
        """
        return attrs.evolve(self.keeping_as(control.name), controls=(*self.controls, control))

    def keeping_as(self, name: str) -> "Demand":
        """Add the name under which a stage keeps something.

        Raises:
            ValueError: Another stage keeps something under it.
        """
        if name in self.kept:
            raise ValueError(
                f"two stages keep something under controls[{name!r}]; leave one of them out, or give it another name"
            )
        return attrs.evolve(self, kept=self.kept | {name})

    def ending(self, step: int | None) -> "Demand":
        """Add an end; the earliest counts."""
        known = [end for end in (self.horizon, step) if end is not None]
        return attrs.evolve(self, horizon=min(known, default=None))


@contextlib.contextmanager
def heard(course: Course) -> Iterator[None]:
    """Warn at the end of a stream of what waited for a result that never came, where there were others."""
    try:
        yield
    finally:
        for control in course.controls:
            tell_unheard(control.name, control.metric, course)


def tell_unheard(name: str, metric: str, course: Course) -> None:
    """Warn that a result never came, where there were others; of those the ones first that are called alike."""
    if course.found and metric not in course.found:
        known = difflib.get_close_matches(metric, course.found, n=5, cutoff=0.0)
        warnings.warn(
            f"{name!r} waited for a result named {metric!r}, which no observer found; they found "
            f"{', '.join(map(repr, known))}{_own(metric, course)}",
            stacklevel=3,
        )


def tell_of_silence(course: Course, *, evaluated: bool) -> None:
    """Warn at the end of a stream of what waited for a result, where no observer found any.

    Args:
        course: Of the stream.
        evaluated: Whether a stage evaluates, when it is time.
    """
    if course.found or not course.metrics:
        return
    advice = "write one that does, as ff.every(100, ff.evaluated(data)) finds 'eval_loss'"
    if evaluated:
        advice = "the evaluation that is there was not due before; let it look more often"
    for name, metric in course.waiting.items():
        warnings.warn(
            f"{name!r} waited for a result named {metric!r}, and no observer found any while the stream ran, up to "
            f"step {course.state.step}: {advice}{_own(metric, course)}",
            stacklevel=3,
        )


def _own(metric: str, course: Course) -> str:
    """Explain a name that is no result's, and is one of the step's own metrics."""
    if metric not in course.metrics:
        return ""
    return (
        f". {metric!r} is a metric of the step, and not what an observer finds: wait for 'eval_loss', or let one find "
        f"it under another name: ff.every(100, lambda tick: {{'train_{metric}': "
        f"float(tick.metrics[{metric!r}])}})"
    )
