"""Whether the processes of a run take the same step: numbers that travel with it, and the text of an error.

Each process has a part of the samples of one batch. One that skipped a batch, or took a step more than the others,
would bring gradients of another batch, or of another state, and all would train on a mixture that no loss shows.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor

from forgather_fn.batch import outline
from forgather_fn.data import Batch
from forgather_fn.fingerprint import number_of
from forgather_fn.flat import Flat
from forgather_fn.mean import Mean
from forgather_fn.share import Microbatches
from forgather_fn.state import TrainState
from forgather_fn.tree import walk
from forgather_fn.world import World, known_to_all

NUMBERS: Final = 3
"""How many :func:`numbers` there are."""

_ELEMENTS, _LEAVES = 256, 64
"""About how many elements of a tensor are looked at, and of how many parts of a batch, however large they are."""

_ROUNDING: Final = 1e-3
"""By how much the number for floating data may differ: each process may have computed them by itself."""

EXACT: Final = (1 << 53) - 1
"""As large as float64 has all whole numbers."""

_CPU: Final = torch.device("cpu")
_WHOLE: Final = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
}
_FLOATING: Final = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
_COMPLEX: Final = {torch.complex64, torch.complex128}


def where(state: TrainState) -> str:
    """Tell where a state is in its run."""
    return f"step {state.step}, sample {state.samples}, seed {state.seed}"


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
    """Tell which step this is, of which batch, and what is in it where it is whole: the text of an error."""
    text = f"{where(state)}: {which(batch)}"
    if isinstance(batch.data, Microbatches):
        return text
    whole, floating = (number.item() for number in content(batch.data))
    return f"{text}, {outline(batch.data)}, some of whose numbers come to {whole} and {floating:.6g}"


def content(data: Any, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """Make a number of some of the integers of a batch, and one of some of its floating numbers; nobody waits for them.

    Values count by their places, so that their order tells. What a process has alone of a batch
    (:class:`~forgather_fn.share.Microbatches`) gives zeros.

    Args:
        data: Of a batch.
        device: Tensors there and on the CPU are looked at.

    Returns:
        An int64 of at most 53 bits; and a float64 that changes little by rounding, whatever the size of the values: for
        each tensor, the logarithm of the sum of absolute values, and what part of that sum a signed one is.

    Example:
        >>> one, other = ({"ids": torch.tensor(ids)} for ids in ([1, 2], [2, 1]))
        >>> content(one) == content(dict(one)), content(one) == content(other)
        (True, False)
    """
    whole, floating = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    if isinstance(data, Microbatches):
        return whole, floating
    for _, leaf in itertools.islice(walk(data), _LEAVES):
        some = _some(leaf)
        if some is None or some.device not in (_CPU, device):
            continue
        factors, signed = _factors(some.device)
        if some.dtype in _WHOLE:
            whole = whole + (some.long() * factors[: some.numel()]).sum()
        else:
            wide = some.double().nan_to_num(0.0, 0.0, 0.0)
            size = torch.linalg.vector_norm(wide, 1).clamp(min=1e-300)
            floating = floating + torch.dot(wide, signed[: some.numel()]) / size + size.log()
    return whole & EXACT, floating


def _some(leaf: Any) -> Tensor | None:
    """Pick some elements of a tensor or an array, without a copy of the others; None of what has no numbers."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" and leaf.dtype.isnative and leaf.size:
        return _some(torch.from_numpy(leaf.reshape(-1)[:: leaf.size // _ELEMENTS | 1].copy()))
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.is_nested or not leaf.numel():
        return None
    tensor = leaf.detach()
    if tensor.dtype in _COMPLEX:
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in _WHOLE and tensor.dtype not in _FLOATING:
        return None
    if tensor.is_contiguous():
        return tensor.view(-1)[:: tensor.numel() // _ELEMENTS | 1]
    return tensor[_places(tensor.shape, tensor.device)]


@functools.lru_cache(maxsize=64)
def _places(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Give places an odd number of elements apart, so that they are in all columns."""
    size = shape.numel()
    flat = torch.arange(0, size, size // _ELEMENTS | 1, device=device)
    return torch.unravel_index(flat, shape)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Give odd numbers below 2**32 in no order, the same everywhere; and such ones between -1 and 1, float64."""
    odd = torch.arange(1, 2 * _ELEMENTS + 1, device=device) * 0x9E3779B1 % 2**32 | 1
    return odd, odd.double() / 2**31 - 1


def numbers(state: TrainState, batch: Batch, device: torch.device = _CPU) -> Tensor:
    """Give numbers by which a step is compared, float64, shape (NUMBERS,): its state and batch, and what is in it."""
    step = number_of(f"{where(state)}: {which(batch)}") & EXACT
    return torch.stack([_on(device, number) for number in (step, *content(batch.data, device))])


def _on(device: torch.device, number: Tensor | int) -> Tensor:
    if isinstance(number, Tensor) and not number.is_cpu:
        return number.double()
    return torch.full((), float(number), dtype=torch.float64, device=device)  # which a copy would wait for


def checked(loss: Mean, rows: Tensor, world: World, state: TrainState, batch: Batch) -> Mean:
    """Give the mean loss of a step, if all processes took the same.

    On an accelerator nobody waits for the answer: the loss is nan otherwise, and so is the gradient, which stops the
    run as any that is not finite does.

    Args:
        loss: Over all processes.
        rows: The :func:`numbers` of each process, shape (processes, NUMBERS).
        world: The processes.
        state: Of this one.
        batch: Of this one.

    Raises:
        ValueError: They took others, on a CPU.
    """
    if not rows.is_cpu:
        return unless_unlike(loss, rows)
    if not torch.equal(rows, rows[:1].expand_as(rows)) and not same(rows):
        refuse(world, told_of(state, batch))
    return loss


def unless_unlike(loss: Mean, rows: Tensor) -> Mean:
    """Give a mean whose total and weight are nan where processes took other steps."""
    alike, weight = same(rows), torch.as_tensor(loss.weight, device=rows.device)
    return Mean(torch.where(alike, loss.total, torch.nan), torch.where(alike, weight, torch.nan))


def same(rows: Tensor) -> Tensor:
    """Tell whether all processes have the first one's :func:`numbers`, that of floating data but for rounding.

    Example:
        >>> same(torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0001]], dtype=torch.float64))
        tensor(True)
    """
    first = rows[0]
    return (rows[:, :2] == first[:2]).all() & ((rows[:, 2] - first[2]).abs() <= _ROUNDING).all()


def compare(world: World, own: Tensor, state: TrainState, batch: Batch) -> None:
    """Make sure that all processes take the same step, before anything of it is sent; collective.

    Args:
        world: The processes.
        own: The :func:`numbers` of this one, on the CPU.
        state: Of this one.
        batch: Of this one.

    Raises:
        ValueError: They take others.
    """
    if not same(world.rows(own)):
        refuse(world, told_of(state, batch))


def refuse(world: World, told: str) -> NoReturn:
    """Refuse a step that is not the same on all processes, which all of them have found."""
    lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(world.gather(told)))
    raise known_to_all(ValueError(f"{_UNLIKE}{lines}"))


_UNLIKE: Final = (
    "the processes of a run must take the same steps on the same batches, of which each has its part; nothing was "
    "updated. A batch is left out by all of them, before its step. They were at:"
)


def bits(flat: Flat) -> Sequence[int]:
    """Add up the bits of flat buffers, as whole numbers: a sum for each, the same in any order."""
    return [_bits(buffer.detach().view(torch.uint8)) for buffer in flat.buffers]


def _bits(raw: Tensor) -> int:
    words = raw.numel() // 8 * 8  # in 64 bits a sum needs no wider copy
    return int(raw[:words].view(torch.int64).sum()) + int(raw[words:].sum())
