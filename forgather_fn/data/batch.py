"""What one step consumes."""

from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from forgather_fn.data.fetch import Indices
from forgather_fn.fingerprint import fingerprint
from forgather_fn.tree import walk


@attrs.frozen(eq=False)
class Batch:
    """What one step consumes.

    Attributes:
        data: What the model and the loss get.
        samples: How many samples are in it.
        indices: Their indices in the dataset, int64, shape (samples,), so that a step can be replayed; None if unknown.
        ragged: Whether it is smaller than the stream's batch size, because an epoch or the stream ended.
        varies: Whether its stream has batches of different sizes, so that a compiler does not count on this one's.
        cursor: Where its source goes on after it, if a number of samples does not say it; the next state keeps it.
        position: How many samples of its stream came before it; None if unknown.
        witness: Of the first batch of a stream of which each process reads its part: the :func:`digest` of the first
            microbatch, which they all have read.
    """

    data: Any
    samples: int
    indices: Indices | None
    ragged: bool = False
    varies: bool = False
    cursor: str | None = None
    position: int | None = None
    witness: str | None = None


def digest(data: Any) -> str:
    """Hash the tensors, arrays and numbers of a batch; texts, such as paths, may differ where the samples are the same.

    Example:
        >>> digest({"x": torch.ones(2), "path": "/a"}) == digest({"x": torch.ones(2), "path": "/b"})
        True
    """
    return fingerprint({path: tensor for path, leaf in walk(data) if (tensor := _tensor(leaf)) is not None})


def _tensor(leaf: Any) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return leaf if leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_quantized else None
    numeric = isinstance(leaf, int | float | np.generic | np.ndarray) and np.asarray(leaf).dtype.kind in "biufc"
    return torch.from_numpy(np.array(leaf)) if numeric else None
