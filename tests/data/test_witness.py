"""What every process reads of a stream's first batch, by which they tell that they read the same data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forgather_fn as ff
from forgather_fn.data.batch import digest
from forgather_fn.share import Share
from tests.streams import Noise, Squares, noisy, taken


def witnesses(stream: ff.Stream, share: Share | None, samples: int = 0, seed: int = 3) -> list[str | None]:
    """Those of the first three batches."""
    return [batch.witness for batch in taken(stream.start(seed, samples, share), 3)]


def in_sequence(**options: Any) -> ff.Stream:
    return ff.batches(ff.data.counted(range(24)), batch_size=8, order="sequential", **options)


STREAMS: dict[str, Any] = {
    "columns": lambda: ff.batches(torch.arange(24), batch_size=8),
    "samples": lambda: ff.batches(Squares(24), batch_size=8),
    "draws": lambda: ff.batches(Noise(24), batch_size=8, random=True),
    "collated": lambda: ff.batches(list(range(24)), batch_size=8, collate=noisy, random=True),
    "threads": lambda: ff.batches(Squares(24), batch_size=8, threads=2),
    "workers": lambda: ff.batches(Noise(24), batch_size=8, random=True, workers=2),
    "ragged": lambda: ff.batches(torch.arange(3), batch_size=8, last="ragged"),
    "in sequence": in_sequence,
    "in sequence, collated": lambda: in_sequence(collate=noisy, random=True),
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_process_has_it_once(name: str) -> None:
    first, *later = zip(*(witnesses(STREAMS[name](), Share(4, rank, 4)) for rank in range(4)), strict=True)
    assert len(set(first)) == 1
    assert first[0] is not None
    assert all(one == (None,) * 4 for one in later)


@pytest.mark.parametrize("name", STREAMS)
def test_it_leaves_the_batches_as_they_are(name: str) -> None:
    """A witness draws under the keys of its samples, and is read beside the batch, not in its place."""
    alone = taken(STREAMS[name]().start(3, 0, Share(4)), 3)
    for rank in range(2):
        shared = taken(STREAMS[name]().start(3, 0, Share(4, rank, 2)), 3)
        for whole, own in zip(alone, shared, strict=True):
            first = own.data.first
            assert own.samples == whole.samples
            assert digest(own.data.items) == digest(whole.data.items[first : first + len(own.data.items)])


@pytest.mark.parametrize("share", [None, Share(4)], ids=["whole", "one process"])
@pytest.mark.parametrize("name", ["columns", "in sequence"])
def test_one_process_reads_nothing_besides(name: str, share: Share | None) -> None:
    assert witnesses(STREAMS[name](), share) == [None, None, None]


def test_it_tells_samples_and_positions_apart() -> None:
    share = Share(4, 1, 2)
    found = [
        witnesses(ff.batches(torch.arange(24), batch_size=8), share)[0],
        witnesses(ff.batches(torch.arange(24) + 1, batch_size=8), share)[0],
        witnesses(ff.batches(torch.arange(24), batch_size=8), share, samples=8)[0],
        witnesses(ff.batches(torch.arange(24), batch_size=8), share, seed=4)[0],
    ]
    assert len(set(found)) == 4


def test_a_digest_is_of_numbers_and_not_of_what_names_them() -> None:
    data = {"x": torch.ones(2), "more": [np.ones(2), np.float32(1.0), 3], "name": "a", "path": Path("/a"), "no": None}
    assert digest(data) == digest(data | {"name": "b", "path": Path("/b")})
    others = [{"x": torch.zeros(2)}, {"x": torch.ones(2).double()}, {"more": [np.ones(2), np.float32(1.0), 4]}]
    assert len({digest(data), *(digest(data | other) for other in others)}) == 4


def test_a_digest_takes_any_leaf() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    leaves = [torch.ones(2).to_sparse(), nested, np.array([{}, ()], dtype=object), np.array(["a"]), torch.ones(2, 0)]
    assert digest(leaves) == digest([*leaves])
    assert digest(torch.ones(2, dtype=torch.complex64).conj()) != digest(torch.zeros(2, dtype=torch.complex64))
    assert digest(torch.ones(3, dtype=torch.bfloat16)) != digest(torch.zeros(3, dtype=torch.bfloat16))
