"""Batch norms for parameters that they were not trained with, such as an average."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from forgather_fn.batch import as_batch
from forgather_fn.data import Stream
from forgather_fn.program import Program
from forgather_fn.random import key, seeded
from forgather_fn.state import Params, TrainState


def refreshed_statistics(
    program: Program, state: TrainState, data: Iterable[Any] | Stream, *, params: Params = "ema"
) -> TrainState:
    """Measure anew what batch norms know of their inputs, for the parameters that are given, by one pass over data.

    An average of parameters makes other activations than the parameters that are trained, whose statistics the buffers
    of a state are. The result is for ``evaluate``, ``apply`` and ``export`` with the same ``params``; training goes on
    from the state that was given. This is ``torch.optim.swa_utils.update_bn``: the mean over the batches, forward
    passes in training mode, and nothing else that a forward pass changes is kept. What they draw derives from the
    state's seed and step.

    Args:
        program: Whose model is run.
        state: Not consumed.
        data: A stream, of which one ordered pass is made, or batches; the model is called on the first element of each.
        params: Which parameters.

    Returns:
        A copy of the state, with other values for the buffers of batch norms.

    Raises:
        ValueError: The model has no batch norm, the processes have shards or stages, or the data are not sequences.
    """
    if program.portion() is not None or program.whole(state) is not state:
        raise ValueError("refreshed_statistics: this process has a part of the model only; export it, and measure that")
    module = program.export(state, params=params)
    norms = {name for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)}
    if not norms:
        raise ValueError(
            f"refreshed_statistics: {type(module).__name__} has no batch norm, so nothing is to be measured"
        )
    like = next(module.parameters())
    with seeded(key(state.seed, state.step, "statistics"), like.device):
        update_bn(_inputs(data, like), module)
    measured = dict(module.named_buffers())
    refreshed = state.copy()
    with torch.no_grad():
        for name, buffer in refreshed.buffers.items():
            if name.rpartition(".")[0] in norms:
                buffer.copy_(measured[name])
    return refreshed


def _inputs(data: Iterable[Any] | Stream, like: Tensor) -> Iterator[Tensor]:
    """Give the first element of each batch, where the model is, and in its type."""
    for item in data.one_pass(0, 1) if isinstance(data, Stream) else data:
        given = as_batch(item).data
        if not isinstance(given, tuple | list) or not isinstance(given[0], Tensor):
            raise ValueError(
                "refreshed_statistics: the model is called on the first element of a batch, which is a tensor in a "
                f"tuple or list; got {type(given).__name__}"
            )
        first = given[0]
        yield first.to(like.device, like.dtype if first.is_floating_point() else None)
