"""The order of training samples: that of transformers.Trainer, from any position on."""

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler


class EpochSampler(RandomSampler):
    """A shuffle that depends on the seed and the epoch alone: ``torch.randperm`` under ``seed + epoch``.

    It is a :class:`~torch.utils.data.RandomSampler` for those who ask for its type, and never draws from the global
    generator.

    Args:
        data_source: What is sampled; only its length is read.
        seed: Of epoch 0.
    """

    def __init__(self, data_source: Sized, seed: int) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(len(self.data_source), generator=generator).tolist()


class LengthGroupedSampler(Sampler[int]):
    """Batches of similar length, in a shuffled order that depends on the seed and the epoch alone.

    As in transformers: samples are shuffled, cut into megabatches, and sorted by length in each, longest first; the
    longest of all comes first.

    Args:
        batch_size: Samples that should be of similar length.
        lengths: Of each sample.
        seed: Of epoch 0.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        self.batch_size, self.lengths, self.seed, self.epoch = batch_size, lengths, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from grouped_by_length(self.lengths, self.batch_size, generator)


def grouped_by_length(lengths: Sequence[int], batch_size: int, generator: torch.Generator | None) -> list[int]:
    """Order samples so that neighbours are of similar length.

    Source: ``get_length_grouped_indices`` of transformers, whose result it equals under the same generator.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = max(min(len(lengths) // (batch_size * 4), 50), 1) * batch_size
    groups = [
        sorted(shuffled[start : start + size], key=lambda i: lengths[i], reverse=True)
        for start in range(0, len(lengths), size)
    ]
    longest = max(range(len(groups)), key=lambda i: lengths[groups[i][0]])
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return [i for group in groups for i in group]


def lengths_of(dataset: Any, column: str, name: str) -> list[int]:
    """Find the length of each sample: a column that holds them, or the length of each sample's input.

    Raises:
        ValueError: There is neither.
    """
    if column in getattr(dataset, "column_names", ()):
        return [int(length) for length in dataset[column]]
    first = dataset[0]
    if not hasattr(first, "keys") or name not in first:
        raise ValueError(
            f"lengths can only be inferred for datasets whose samples are dictionaries with an {name!r} key; this one "
            f"gives {type(first).__name__}. Add a column {column!r} with the length of each sample."
        )
    return [len(dataset[i][name]) for i in range(len(dataset))]
