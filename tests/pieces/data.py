"""Data: sources, orders, sizes of batches, and how they are read."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import forgather_fn as ff
from tests import specimens
from tests.pieces.piece import Piece

DOCUMENTS = [[7, 1, 2], [3], [4, 5, 6, 8, 9, 1, 2], [5, 5], [6, 1, 4, 2], [1, 9, 8], [2, 2, 3, 4, 4]]


def samples(count: int = 11) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*specimens.ragged_classes(count), strict=True))


def pairs(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*rows, strict=True)
    return torch.stack(x), torch.stack(y)


class Source:
    """An iterable that says and takes where it is."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        found = samples()
        while self.next < len(found):
            self.next += 1
            yield found[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def iterated(source: Any, **given: Any) -> ff.Stream:
    return ff.batches(source, batch_size=4, order="sequential", collate=pairs, **given)


def mixed() -> ff.Stream:
    sources = {"many": specimens.ragged_classes(9), "few": specimens.ragged_classes(4)}
    weights = {0: {"many": 1, "few": 1}, 10: {"many": 1, "few": 3}}
    return ff.batches(ff.data.mixture(sources, weights=weights), batch_size=4, collate=pairs)


def words(count: int) -> dict[str, Tensor]:
    found = specimens.words(count)
    return {"input": found["input_ids"], "labels": found["labels"], "source": torch.arange(count) % 2}


def words_by_source() -> ff.Stream:
    sources = {name: {k: v for k, v in words(n).items() if k != "source"} for name, n in (("a", 5), ("b", 3))}
    return ff.batches(ff.data.mixture(sources, label="source"), batch_size=4)


def named(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch rows of documents for a model that has no positions."""
    return {
        "input": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def packed(layout: Any) -> Piece:
    """Train on rows of documents."""
    rows = layout(DOCUMENTS, length=6)
    return Piece(
        fields=lambda: {"model": specimens.tied_by_object, "loss": ff.losses.causal_lm},
        batch=lambda count: named([rows[i % len(rows)] for i in range(count)]),
        stream=lambda: ff.batches(rows, batch_size=4, collate=named),
    )


PIECES = {
    "mixture": Piece(stream=mixed),
    "by_source": Piece(
        fields=lambda: {
            "loss": ff.losses.by_source(ff.losses.causal_lm, ("a", "b")),
            "model": specimens.tied_by_object,
        },
        batch=words,
        stream=words_by_source,
    ),
    "by_length": Piece(
        stream=lambda: ff.batches(
            specimens.ragged_classes(11), batch_size=4, order=ff.data.by_length(range(11), group=4, groups=2)
        )
    ),
    "rampup": Piece(
        stream=lambda: ff.batches(
            specimens.ragged_classes(11), batch_size=ff.data.rampup(start=4, stop=6, increment=1, samples=16)
        )
    ),
    "batches/threads": Piece(stream=lambda: ff.batches(samples(), batch_size=4, collate=pairs, threads=2)),
    "batches/stateful": Piece(stream=lambda: iterated(Source(), threads=1)),
    "counted": Piece(stream=lambda: iterated(ff.data.counted(samples))),
    "packed": packed(ff.data.packed),
    "best_fit": packed(ff.data.best_fit),
}
