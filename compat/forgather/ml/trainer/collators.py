"""How samples become a batch where no collator is given.

The rules are those of transformers 5.23, so that a batch is the same under both trainers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import default_collate

LABELS: Final = ("label", "label_ids")
"""What becomes ``labels`` in a batch: one number a sample, or several."""


def default_data_collator(features: Sequence[Any], return_tensors: str = "pt") -> Any:
    """Stack samples, key by key; ``label`` and ``label_ids`` become ``labels``.

    Args:
        features: Mappings, or objects with attributes. The first one says which keys there are: texts and None are
            left out. Tuples, tensors and arrays are collated as torch's own loader does.
        return_tensors: ``"pt"`` for torch, ``"np"`` for numpy.

    Returns:
        For each key an array with the samples along its first dimension. Labels are int64, or float32 where the first
        one is not an integer.

    Example:
        >>> default_data_collator([{"x": [1, 2], "label": 0}, {"x": [3, 4], "label": 1}])
        {'labels': tensor([0, 1]), 'x': tensor([[1, 2], [3, 4]])}
    """
    if return_tensors not in ("pt", "np"):
        raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or 'np'")
    if not isinstance(features[0], Mapping) and not hasattr(features[0], "__dict__"):
        return default_collate(list(features))  # tuples, numbers, arrays: as torch's own loader
    if isinstance(features[0], torch.Tensor):
        return default_collate(list(features))
    rows = [one if isinstance(one, Mapping) else vars(one) for one in features]
    first = rows[0]
    stack = _torch_stack if return_tensors == "pt" else _numpy_stack
    batch = {}
    label = next((name for name in LABELS if first.get(name) is not None), None)
    if label is not None:
        batch["labels"] = stack([row[label] for row in rows], typed=True)
    for name, value in first.items():
        if name not in LABELS and value is not None and not isinstance(value, str):
            batch[name] = stack([row[name] for row in rows], typed=False)
    return batch


def _torch_stack(values: list[Any], typed: bool) -> torch.Tensor:
    first = values[0]
    if isinstance(first, torch.Tensor) and (not typed or first.dim()):
        return torch.stack(values)
    if isinstance(first, np.ndarray) and not typed:
        return torch.from_numpy(np.stack(values))
    if not typed:
        return torch.tensor(values)
    return torch.tensor(values, dtype=torch.long if _is_integer(first) else torch.float)


def _numpy_stack(values: list[Any], typed: bool) -> np.ndarray[Any, Any]:
    first = values[0]
    if isinstance(first, np.ndarray) and (not typed or first.ndim):
        return np.stack(values)
    if not typed:
        return np.array(values)
    return np.array(values, dtype=np.int64 if _is_integer(first) else np.float32)


def _is_integer(value: Any) -> bool:
    """Tell whether a label, or the first of several, is an integer."""
    if isinstance(value, torch.Tensor | np.ndarray) and not value.shape:
        value = value.item()
    elif not np.isscalar(value):
        value = value[0]
    return isinstance(value, int | np.integer)


@dataclass
class DefaultDataCollator:
    """:func:`default_data_collator` as an object.

    Attributes:
        return_tensors: ``"pt"`` or ``"np"``.
    """

    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Stack samples."""
        return default_data_collator(features, return_tensors or self.return_tensors)


@dataclass
class DataCollatorWithPadding:
    """Pad samples to one length with a tokenizer, and stack them.

    Attributes:
        tokenizer: Of transformers, or anything with its ``pad``.
        padding: True or ``"longest"``, ``"max_length"``, or False.
        max_length: To which length, for ``"max_length"``.
        pad_to_multiple_of: Round lengths up to a multiple of this.
        return_tensors: ``"pt"`` or ``"np"``.
    """

    tokenizer: Any
    padding: bool | str | Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Pad and stack; ``label`` and ``label_ids`` become ``labels``."""
        # A fast tokenizer advises against pad() after calling it on single texts, which data sets do.
        warned = getattr(self.tokenizer, "deprecation_warnings", {})
        before = warned.get("Asking-to-pad-a-fast-tokenizer", False)
        warned["Asking-to-pad-a-fast-tokenizer"] = True
        try:
            batch = self.tokenizer.pad(
                features,
                padding=self.padding,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
        finally:
            warned["Asking-to-pad-a-fast-tokenizer"] = before
        for name in LABELS:
            if name in batch:
                batch["labels"] = batch[name]
                del batch[name]
        return batch


def default_collator(processing_class: Any = None) -> Any:
    """Choose as transformers does: padding for tokenizers and feature extractors, stacking for all else.

    Args:
        processing_class: What the trainer was given: a tokenizer, an image processor, or None.
    """
    bases = {kind.__name__ for kind in type(processing_class).__mro__}
    if bases & {"PreTrainedTokenizerBase", "SequenceFeatureExtractor"}:
        return DataCollatorWithPadding(processing_class)
    return default_data_collator
