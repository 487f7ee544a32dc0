"""Evaluation and prediction: the model on data, without gradients, leaving the state as it is."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from forgather_fn import interrupt
from forgather_fn.batch import as_batch
from forgather_fn.built import Built
from forgather_fn.data import Stream
from forgather_fn.flat import Flat
from forgather_fn.mean import Mean
from forgather_fn.model import evaluation_mode
from forgather_fn.random import key, seeded
from forgather_fn.state import Arrays, TrainState, raise_if_nonfinite

Which = Literal["params", "ema"]


def evaluate(built: Built, state: TrainState, data: Any, params: Which) -> dict[str, float]:
    """Run the loss over every sample once and give each named mean; see :class:`~forgather_fn.plan.Evaluate`.

    Raises:
        ValueError: The data gave no batch, or the plan keeps no average.
        NonFiniteError: A step before was not finite.
    """
    raise_if_nonfinite(state)
    totals: dict[str, Mean] = {}
    with _evaluating(built, state, params):
        for i, item in enumerate(data.one_pass() if isinstance(data, Stream) else data):
            interrupt.check()
            with seeded(key(state.seed, state.step, i, "evaluate"), built.device):
                means = built.forward(built.place(as_batch(item).data))
            for name, mean in means.items():
                totals[name] = totals[name] + mean.detach() if name in totals else mean.detach()
    if not totals:
        raise ValueError(
            "the evaluation data gave no batch; an iterator can be used once only: pass a stream or a list"
        )
    return {name: float(mean) for name, mean in totals.items()}


def apply(built: Built, state: TrainState, inputs: tuple[Any, ...], named: dict[str, Any], params: Which) -> Any:
    """Call the model on inputs in evaluation mode; see :class:`~forgather_fn.plan.Apply`."""
    with (
        _evaluating(built, state, params),
        seeded(key(state.seed, state.step, "apply"), built.device),
        built.autocast(),
    ):
        return built.module(*built.place(inputs), **built.place(named))


@contextlib.contextmanager
def _evaluating(built: Built, state: TrainState, params: Which) -> Iterator[None]:
    """Bind the module to the parameters asked for, in evaluation mode; put modes and buffers back afterwards."""
    arrays = state.read()
    built.bound(arrays)
    if params == "ema":
        built.binding.bind(average_of(arrays), arrays.frozen, arrays.buffers)
    elif params != "params":
        raise ValueError(f"params={params!r} is not one of 'params', 'ema'")
    before = arrays.buffers.copy() if arrays.buffers else None
    modes = evaluation_mode(built.module)
    try:
        with torch.no_grad():
            yield
    finally:
        modes.restore()
        if before is not None:
            arrays.buffers.assign(before)
        built.binding.bind(arrays.params, arrays.frozen, arrays.buffers)


def average_of(arrays: Arrays) -> Flat:
    """Give the averaged parameters of a state.

    Raises:
        ValueError: The plan keeps none.
    """
    if arrays.ema is None:
        raise ValueError("params='ema', but the plan keeps no average; add Plan(average=ff.ema(decay))")
    return arrays.ema
