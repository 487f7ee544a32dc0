"""Documents of unequal length packed into rows of one length, without losing or doubling a token."""

import bisect
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forgather_fn.data.fetch import Indices, MapDataset
from forgather_fn.data.lengths import MOST, lengths_of
from forgather_fn.signature import checked

UNLABELLED: Final = -100
"""The label of what is not to be predicted, in torch and everywhere else."""


@attrs.frozen
class Segment:
    """A part of a document in a row: its tokens from ``start`` on, before ``stop``."""

    document: int
    start: int
    stop: int


@attrs.frozen(eq=False, repr=False)
class Packed:
    """A dataset of rows that documents lie in, one behind the other; made by :func:`packed` or :func:`best_fit`.

    A row is a mapping of int64 tensors of shape (length,): ``input_ids``; ``labels``, which are -100 at the first token
    of each segment, so that nothing is predicted across a boundary; and ``position_ids``, which start at 0 with each
    segment. The end of a row that is not full is padded, as one more segment without labels.

    Attributes:
        documents: As given.
        lengths: Tokens of each.
        length: Tokens in a row.
        rows: How many.
        pad: The token that fills up.
    """

    documents: Any
    lengths: Indices
    length: int
    rows: int
    pad: int
    _layout: Callable[[int], list[Segment]]

    def __len__(self) -> int:
        return self.rows

    def segments(self, row: int) -> list[Segment]:
        """Tell what lies in a row, in its order."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        return self._layout(row)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = np.full(self.length, self.pad, np.int64)
        labels = np.full(self.length, UNLABELLED, np.int64)
        positions = np.empty(self.length, np.int64)
        filled = 0
        for segment in self.segments(row):
            size = segment.stop - segment.start
            here = slice(filled, filled + size)
            tokens[here] = self._tokens(segment)
            labels[filled + 1 : filled + size] = tokens[filled + 1 : filled + size]
            positions[here] = np.arange(size)
            filled += size
        positions[filled:] = np.arange(self.length - filled)
        named = {"input_ids": tokens, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(column) for name, column in named.items()}

    def _tokens(self, segment: Segment) -> Any:
        whole = tokens_of(self.documents[segment.document])
        if _count(whole, segment.document) != self.lengths[segment.document]:
            raise ValueError(
                f"document {segment.document} has {len(whole)} tokens, but its length was given as "
                f"{self.lengths[segment.document]}"
            )
        tokens = np.asarray(whole[segment.start : segment.stop])
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"document {segment.document} has tokens of {tokens.dtype}, shape {tokens.shape}: expected integers in "
                "one dimension"
            )
        return tokens

    def __repr__(self) -> str:
        return f"<{self.rows} rows of {self.length} tokens>"


@checked
def packed(
    documents: Any, *, length: int, lengths: Sequence[int] | npt.NDArray[np.integer] | None = None, pad: int = 0
) -> Packed:
    """Lay documents end to end and cut them into rows: all rows but the last are full.

    A document that runs over the end of a row goes on in the next, as a segment that sees nothing of the first. A row
    is found by bisection over the cumulative lengths (8 bytes a document), so that the rows can be shuffled, mixed and
    resumed as any dataset; their order is that of the documents, and shuffling acts on rows.

    Args:
        documents: Sequences of tokens, or mappings with ``"input_ids"``, that can be indexed.
        length: Tokens in a row.
        lengths: Tokens of each document; None to read all of them once and count.
        pad: The token that fills up the last row.

    Raises:
        ValueError: The length is less than 2, there are no tokens, or a document's length is not what was given.

    Example:
        >>> rows = packed([[1, 2, 3], [4, 5], [6, 7, 8, 9]], length=4)
        >>> [rows[i]["input_ids"].tolist() for i in range(3)]
        [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
        >>> rows[1]["position_ids"].tolist(), rows[1]["labels"].tolist()
        ([0, 0, 1, 2], [-100, -100, 7, 8])
    """
    known = _measured("packed", documents, length, lengths, pad)
    ends = np.cumsum(known)
    return Packed(documents, known, length, -(-int(ends[-1]) // length), pad, EndToEnd(ends, length))


@checked
def best_fit(
    documents: Any, *, length: int, lengths: Sequence[int] | npt.NDArray[np.integer] | None = None, pad: int = 0
) -> Packed:
    """Put whole documents into rows, each into the row with the least room that it fits in, the longest first.

    A document is cut only if it is longer than a row. Some rows are padded: few, where short documents fill them up.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.

    Args:
        documents: As of :func:`packed`.
        length: Tokens in a row.
        lengths: Tokens of each document; None to read all of them once and count.
        pad: The token that fills up rows.

    Raises:
        ValueError: As of :func:`packed`.

    Example:
        >>> rows = best_fit([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], length=5)
        >>> [rows[i]["input_ids"].tolist() for i in range(len(rows))]
        [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    """
    known = _measured("best_fit", documents, length, lengths, pad)
    cut = _longest_first(known, length)
    rooms: dict[int, list[int]] = {}  # rows by how many tokens they still take
    sizes: list[int] = []  # the keys of it, ascending
    rows = np.empty(len(cut), np.int64)
    count = 0
    for number, size in enumerate((cut[:, 2] - cut[:, 1]).tolist()):
        place = bisect.bisect_left(sizes, size)
        if place < len(sizes):
            room = sizes[place]
            row = rooms[room].pop()
            if not rooms[room]:
                del rooms[room], sizes[place]
        else:
            room, row, count = length, count, count + 1
        rows[number] = row
        if room > size:
            if room - size not in rooms:
                bisect.insort(sizes, room - size)
            rooms.setdefault(room - size, []).append(row)
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], np.arange(count + 1))
    return Packed(documents, known, length, count, pad, Fitted(cut[order], bounds))


@attrs.frozen(eq=False)
class EndToEnd:
    """The layout of documents one behind the other, by where each ends."""

    ends: Indices
    length: int

    def __call__(self, row: int) -> list[Segment]:
        """Find the segments of a row."""
        start, stop = row * self.length, min((row + 1) * self.length, int(self.ends[-1]))
        segments, document = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begins = int(self.ends[document - 1]) if document else 0
            ends = min(int(self.ends[document]), stop)
            if ends > start:
                segments.append(Segment(document, start - begins, ends - begins))
            start, document = max(start, ends), document + 1
        return segments


@attrs.frozen(eq=False)
class Fitted:
    """A layout that was worked out: all segments, int64, shape (segments, 3), and where those of each row begin."""

    segments: Indices
    bounds: Indices

    def __call__(self, row: int) -> list[Segment]:
        """Find the segments of a row."""
        return [Segment(*segment) for segment in self.segments[self.bounds[row] : self.bounds[row + 1]].tolist()]


def tokens_of(document: Any) -> Any:
    """Find the tokens of a document: the sequence itself, or what a mapping has under ``"input_ids"``."""
    if isinstance(document, Mapping):
        if "input_ids" not in document:
            raise ValueError(f"a document has no 'input_ids', but {sorted(document)}: expected the tokens under it")
        return document["input_ids"]
    return document


def _longest_first(lengths: Indices, length: int) -> Indices:
    """Cut documents into segments of at most a row, and sort them by falling length."""
    counts = -(-lengths // length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    stops = np.minimum(starts + length, lengths[documents])
    return np.stack([documents, starts, stops], 1)[np.argsort(starts - stops, kind="stable")]


def _count(tokens: Any, document: int) -> int:
    single = isinstance(tokens, Tensor | np.ndarray) and tokens.ndim == 0
    if single or not isinstance(tokens, Sized) or isinstance(tokens, str | bytes):
        raise ValueError(f"document {document} is a {type(tokens).__name__}: expected a sequence of tokens")
    return len(tokens)


def _measured(what: str, documents: Any, length: int, lengths: Any, pad: int) -> Indices:
    if not 2 <= length <= MOST or not 0 <= pad <= MOST:
        raise ValueError(
            f"{what}: length={length}, pad={pad}: a row has a whole number of tokens, at least 2, since each is "
            "predicted from those before; the token that fills it up is at least 0"
        )
    flat = isinstance(documents, Tensor | np.ndarray) and documents.ndim < 2
    if flat or isinstance(documents, str | bytes | Mapping) or not isinstance(documents, MapDataset):
        raise ValueError(
            f"a {type(documents).__name__} is no collection of documents: expected something with __len__ and "
            "__getitem__ that gives sequences of tokens, or mappings with 'input_ids'"
        )
    if lengths is None:
        lengths = [_count(tokens_of(documents[number]), number) for number in range(len(documents))]
    known = lengths_of(lengths, what)
    if len(known) != len(documents):
        raise ValueError(f"lengths have the shape {known.shape}: expected one for each of {len(documents)} documents")
    if not known.sum():
        raise ValueError("the documents have no tokens: there is nothing to pack")
    return known
