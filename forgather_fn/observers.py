"""Observers: evaluation and reports."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from forgather_fn.loop import Clock, Data, Steps, Tick
from forgather_fn.program import Measure
from forgather_fn.reports.row import Row, Sink
from forgather_fn.reports.row import sink as as_sink
from forgather_fn.reports.throughput import Count, throughput
from forgather_fn.signature import checked, shown
from forgather_fn.stages import Observer, once
from forgather_fn.state import Params, raise_if_nonfinite
from forgather_fn.wanted import check_wants, is_wanted


@checked
def evaluated(
    data: Data,
    *,
    params: Params = "params",
    metrics: Sequence[Measure] = (),
    name: str = "eval",
) -> Observer:
    """Evaluate the state on data; results are named ``<name>_<metric>``: ``eval_loss``.

    Args:
        data: A stream, of which one ordered pass is made, or a list of batches.
        params: Which parameters: the trained ones, or their average.
        metrics: What is measured besides the loss: ``(ff.metrics.accuracy, ff.metrics.f1(classes=10))``.
        name: What the results begin with.

    Raises:
        ValueError: ``data`` or ``metrics`` could be read only once.
    """
    if not isinstance(metrics, Sequence):  # one look after the other
        raise ValueError(f"evaluated: metrics takes a sequence: metrics=(...,); got {shown(metrics)}")
    if isinstance(data, Iterator):
        raise ValueError(
            f"evaluated: data is a {type(data).__name__}, which can be read once, and not at each look; give a stream "
            "(ff.batches), or a list of batches"
        )

    def observe(tick: Tick) -> Mapping[str, float]:
        found = tick.run.program.evaluate(tick.state, data, params=params, metrics=metrics)
        return {f"{name}_{metric}": value for metric, value in found.items()}

    def answer(tick: Tick) -> "Future[Mapping[str, Any]]":
        done: Future[Mapping[str, Any]] = Future()
        done.set_result(observe(tick))
        return done

    return Observer(observe, answers={"evaluate": answer})


@checked
def report(*sinks: Sink | Callable[[Row], None], wants: Iterable[str] = (), clock: Clock = time.monotonic) -> Observer:
    """Write the numbers of a tick to sinks: the step's metrics, the results of observers upstream, and rates.

    This is where metrics leave the device, so where a run waits for it. Rates are means since the report before. Of
    several processes the first one reports.

    Args:
        sinks: Such as ``bar()``, ``tensorboard(path)``, ``jsonl(path)``, ``console()``, or any function of a row.
        wants: Metrics beyond the usual ones that steps are to compute for it, such as ``"gradient_norms"``; see
            :data:`~forgather_fn.wanted.WANTS`. What other observers asked for is not written.
        clock: Gives seconds.

    Raises:
        ValueError: A metric that is wanted is unknown, or is not one number.
        NonFiniteError: At a look: a step before was not finite.
    """
    lifted, names = [as_sink(sink) for sink in sinks], list(wants)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"report: wants takes names of metrics; got {shown(names)}")
    asked = frozenset(names)
    check_wants(asked)
    if "gradients" in asked:
        raise ValueError('report: "gradients" are tensors, and a row has numbers: ask for "gradient_norms"')
    begun = 0.0
    before: Count | None = None

    def observe(tick: Tick) -> None:
        nonlocal before
        state = tick.state
        raise_if_nonfinite(state)
        if not tick.run.program.world.main:
            return
        metrics = {name: value for name, value in tick.metrics.items() if is_wanted(name, asked)}
        values = {name: _scalar(name, value) for name, value in metrics.items()} | dict(tick.results)
        now = Count(clock(), state.samples, int(state.tokens))
        values |= throughput(before, now) if before is not None else {}
        if now.tokens == now.samples:  # rows that are no sequences count as one token each: one rate is enough
            values.pop("tokens_per_second", None)
        before = now
        row = Row(
            step=state.step,
            samples=state.samples,
            epoch=tick.run.epoch(state.samples),
            started=tick.run.started,
            horizon=tick.run.horizon,
            seconds=now.seconds - begun,
            values=values,
        )
        for sink in lifted:
            sink(row)

    def opened(steps: Steps) -> None:
        nonlocal begun, before
        del steps
        begun, before = clock(), None

    def close() -> None:
        with contextlib.ExitStack() as stack:
            for sink in reversed(lifted):
                stack.callback(sink.close)

    return once(Observer(observe, wants=asked, open=opened, close=close))


def _scalar(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"report: the metric {name!r} is not one number: {value!r}") from error
