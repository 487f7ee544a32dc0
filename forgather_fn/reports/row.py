"""One row of a report, and the sinks that rows go to."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, SupportsFloat, TypeVar, runtime_checkable

import attrs

T = TypeVar("T")


def _scalars(values: Mapping[str, SupportsFloat]) -> Mapping[str, float]:
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if name in _FIELDS:
            raise ValueError(f"a row has a field {name!r} of its own: report this value under another name")
        try:
            scalars[name] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"the value {name!r} of a row must be one number, got {value!r}") from error
    return MappingProxyType(scalars)


@attrs.frozen(kw_only=True)
class Row:
    """What is known of a training at one step.

    Attributes:
        step: Batches consumed since the beginning of the job.
        samples: Samples consumed since the beginning of the job.
        epoch: Epochs consumed, a fraction; None for data without an end.
        started: The step at which this attempt began: 0, or the step that it was restored at. Rows of earlier attempts
            beyond it are superseded.
        horizon: The step at which the run ends, if known.
        seconds: Time since this attempt was at ``started``, by the clock of whoever makes the rows.
        values: Scalars by name: ``loss``, ``learning_rate``, ``grad_norm``, ``samples_per_second``,
            ``tokens_per_second``, ``eval_loss``, ... Copied, turned into floats, and read-only from then on.

    Raises:
        ValueError: ``step`` comes before ``started``; a value is not one number, or has the name of another field.

    Example:
        >>> row = Row(step=10, samples=320, seconds=2.0, values={"loss": 3})
        >>> row.values["loss"]
        3.0
    """

    step: int = attrs.field()
    samples: int
    epoch: float | None = None
    started: int = 0
    horizon: int | None = None
    seconds: float
    values: Mapping[str, float] = attrs.field(converter=_scalars)

    def __attrs_post_init__(self) -> None:
        if self.step < self.started:
            raise ValueError(f"a row at step {self.step} cannot belong to an attempt that started at {self.started}")


_FIELDS = frozenset(attrs.fields_dict(Row))


def remaining(row: Row) -> float | None:
    """Estimate the time to the end of the run, from the mean pace of this attempt.

    Returns:
        Seconds; zero at the horizon and beyond it. None where the horizon is not known, or no step was taken yet.

    Example:
        >>> remaining(Row(step=40, samples=0, started=20, horizon=100, seconds=10.0, values={}))
        30.0
    """
    if row.horizon is None or row.step == row.started:
        return None
    return row.seconds / (row.step - row.started) * max(row.horizon - row.step, 0)


@runtime_checkable
class Sink(Protocol):
    """Where rows go: a file, a terminal, a service.

    Rows come in the order of their steps, from one process. Nothing is opened before the first row, so that composing a
    report costs nothing and leaves nothing behind.
    """

    def __call__(self, row: Row, /) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Write what is pending, and give up what is held. A second call does nothing."""
        ...


@attrs.frozen(eq=False)
class _Pair:
    write: Callable[[Row], None]
    finish: Callable[[], None]

    def __call__(self, row: Row, /) -> None:
        self.write(row)

    def close(self) -> None:
        self.finish()


def sink(function: Callable[[Row], None]) -> Sink:
    """Lift a function of rows to a sink whose ``close`` does nothing. A sink is returned as it is.

    Example:
        >>> rows = []
        >>> collect = sink(rows.append)
        >>> collect(Row(step=1, samples=2, seconds=0.5, values={}))
        >>> collect.close()
        >>> rows[0].samples
        2
    """
    ours = inspect.isfunction(function) and function.__module__.startswith("forgather_fn.reports.")
    if ours and "<" not in function.__qualname__:  # not within another: it makes a sink
        name = function.__name__
        raise ValueError(
            f"a sink is what {name}(...) gives: write {name}(...), and not {name}, which no row would reach"
        )
    if not callable(function):
        raise ValueError(
            f"a sink is a function of a row, such as jsonl(path) of forgather_fn.reports gives; got {function!r}"
        )
    return function if isinstance(function, Sink) else _Pair(function, lambda: None)


def opened(name: str, open: Callable[[Row], T], write: Callable[[T, Row], None], close: Callable[[T], None]) -> Sink:
    """Make a sink of something that is opened at the first row, and closed at most once.

    A sink serves one attempt: what its rows supersede is settled when it opens. So a row after ``close`` is refused.

    Args:
        name: The call that made the sink, for messages.
        open: Takes the first row (which is then written too), and returns what is to be held.
        write: Puts a row into what is held.
        close: Gives up what is held. Not called where there was no row.

    Raises:
        ValueError: By the sink: it is closed.
    """
    held: list[T] = []
    closed = False

    def receive(row: Row) -> None:
        if closed:
            raise ValueError(f"{name} was closed before the row at step {row.step}: make a new sink for each run")
        if not held:
            held.append(open(row))
        write(held[0], row)

    def finish() -> None:
        nonlocal closed
        closed = True
        while held:
            close(held.pop())

    return _Pair(receive, finish)
