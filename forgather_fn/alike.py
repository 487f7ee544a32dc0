"""Whether the processes of a run take the same step: numbers that travel with it, and the text of an error.

Each process has a part of the samples of one batch. One that skipped a batch, or took a step more than the others,
would bring gradients of another batch, or of another state, and all would train on a mixture that no loss shows.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from forgather_fn.batch import outline
from forgather_fn.data import Batch
from forgather_fn.data.batch import tensor_of
from forgather_fn.fingerprint import number_of
from forgather_fn.flat import Flat
from forgather_fn.share import Microbatches
from forgather_fn.state import TrainState
from forgather_fn.tree import walk
from forgather_fn.world import World, check_same

NUMBERS: Final = 3
"""How many :func:`numbers` there are."""

_LOOKED_AT: Final = 256
"""About how many elements of a tensor are looked at, however large it is."""

_ROUNDING: Final = 1e-3
"""By how much of it the sum of absolute values may differ: each process may have computed them by itself."""


def where(state: TrainState) -> str:
    """Tell where a state is in its run."""
    return f"step {state.step}, sample {state.samples}, seed {state.seed}, {state.data or 'no stream'}"


def which(batch: Batch) -> str:
    """Tell which batch it is, as far as that is known without its data: the same text on all processes."""
    told = f"a batch of {batch.samples} samples"
    if batch.position is not None:
        told += f" from sample {batch.position} on"
    if batch.indices is not None and len(batch.indices):
        told += f", {batch.indices[0]} to {batch.indices[-1]} of the dataset"
    if batch.witness is not None:
        told += f", the first microbatch of which is {batch.witness[:16]}"
    return told


def told_of(state: TrainState, batch: Batch) -> str:
    """Tell which step this is, of which batch, and what is in it where it is whole, and on the CPU."""
    text = f"{where(state)}: {which(batch)}"
    if isinstance(batch.data, Microbatches):
        return text
    sums = [number for number in content(batch.data) if not isinstance(number, Tensor)]
    return f"{text}, {outline(batch.data)}, where some numbers sum to {sums}"


def content(data: Any) -> tuple[Tensor | int, Tensor | float]:
    """Add up some of the integers of a batch, and the absolute values of some of its floating numbers.

    What a process has alone of a batch (:class:`~forgather_fn.share.Microbatches`) gives zeros.

    Returns:
        The two sums; on the device where the data are, or numbers where that is the CPU.

    Example:
        >>> content({"ids": torch.tensor([1, 2]), "x": torch.tensor([0.5, -0.5])})
        (3, 1.0)
    """
    integers: Tensor | int = 0
    floating: Tensor | float = 0.0
    if isinstance(data, Microbatches):
        return integers, floating
    for _, leaf in walk(data):
        tensor = tensor_of(leaf)
        if tensor is None or not tensor.numel():
            continue
        some = _some(tensor.detach())
        if some.is_complex():
            some = torch.view_as_real(some.resolve_conj())
        if some.is_floating_point():
            found = some.double().abs().nan_to_num(0.0, 0.0, 0.0).sum()
            floating = floating + (float(found) if found.is_cpu else found)
        else:
            count = some.long().sum()
            integers = integers + (int(count) if count.is_cpu else count)
    return integers, floating


def _some(tensor: Tensor) -> Tensor:
    """Pick elements of some rows; an odd number of them apart, so that they are of all columns."""
    rows = tensor[:: tensor.shape[0] // 16 + 1] if tensor.dim() else tensor
    flat = rows.reshape(-1)
    return flat[:: flat.numel() // _LOOKED_AT | 1]


def numbers(state: TrainState, batch: Batch, device: torch.device) -> Tensor:
    """Give numbers by which a step is compared, float64, shape (NUMBERS,): its state and batch, and what is in it."""
    step = number_of(f"{where(state)}: {which(batch)}") >> 10  # as large as float64 has all integers
    told = (step, *content(batch.data))
    if any(isinstance(number, Tensor) for number in told):
        return torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in told])
    return torch.tensor(told, dtype=torch.float64, device=device)


def checked(weight: Tensor, rows: Tensor, world: World, state: TrainState, batch: Batch) -> Tensor:
    """Give the weight of a step, if all processes took the same.

    On an accelerator nobody waits for the answer: the weight is nan otherwise, which stops the run as any that is not
    finite does.

    Args:
        weight: Of all samples of the step.
        rows: The :func:`numbers` of each process, shape (processes, NUMBERS).
        world: The processes.
        state: Of this one.
        batch: Of this one.

    Raises:
        ValueError: They took others, on a CPU.
    """
    if not rows.is_cpu:
        return torch.where(same(rows), weight, torch.nan)
    if not torch.equal(rows, rows[:1].expand_as(rows)) and not same(rows):
        check_same(world.gather(told_of(state, batch)), _UNLIKE)
    return weight


def same(rows: Tensor) -> Tensor:
    """Tell whether all processes have the first one's :func:`numbers`, floating ones but for rounding.

    Example:
        >>> same(torch.tensor([[1.0, 2.0, 100.0], [1.0, 2.0, 100.01]], dtype=torch.float64))
        tensor(True)
    """
    first = rows[0]
    near = (rows[:, 2] - first[2]).abs() <= _ROUNDING * first[2]
    return (rows[:, :2] == first[:2]).all() & near.all()


_UNLIKE: Final = (
    "the processes of a run must take the same steps on the same batches, of which each has its part; nothing was "
    "updated. A step that failed on one of them is tried again there with the same batch; a batch is left out by all, "
    "before its step. They were at:"
)


def bits(params: Flat) -> Sequence[int]:
    """Add up the bits of parameters, as whole numbers: a sum for each buffer, the same in any order."""
    return [int(buffer.view(_WORDS[buffer.dtype.itemsize]).sum()) for buffer in params.buffers]


_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as large as an element of a parameter, to add up its bits."""
