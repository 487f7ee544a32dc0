"""Packing: no token lost or doubled, and nothing seen or predicted across a boundary."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.data.packing import Packed, best_fit, packed
from forgather_fn.testing import check_data
from tests import specimens

LAYOUTS = {"packed": packed, "best_fit": best_fit}
DOCUMENTS = [[7, 1, 2], [3], [4, 5, 6, 8, 9, 1, 2], [], [5, 5], [6, 1, 4, 2]]


def check_packing(rows: Packed, documents: list[list[int]], length: int) -> None:
    """Law: each token of each document lies in one row, in its place; all else is padding."""
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(len(rows)):
        row, filled = rows[number], 0
        for segment in rows.segments(number):
            here = slice(filled, filled + segment.stop - segment.start)
            expected = documents[segment.document][segment.start : segment.stop]
            assert row["input_ids"][here].tolist() == expected
            assert row["labels"][here].tolist() == [-100, *expected[1:]]
            assert row["position_ids"][here].tolist() == list(range(len(expected)))
            seen.update((segment.document, token) for token in range(segment.start, segment.stop))
            filled = here.stop
        assert filled > 0
        assert {name: tuple(column.shape) for name, column in row.items()} == dict.fromkeys(row, (length,))
        assert row["labels"][filled:].tolist() == [-100] * (length - filled)
        assert row["position_ids"][filled:].tolist() == list(range(length - filled))
    tokens = [(number, token) for number, document in enumerate(documents) for token in range(len(document))]
    assert seen == Counter(tokens), "a token was lost or doubled"


documents_of = st.lists(st.lists(st.integers(1, 99), max_size=12), min_size=1, max_size=15).filter(any)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(documents=documents_of, length=st.integers(2, 10))
def test_no_token_is_lost_or_doubled(layout: str, documents: list[list[int]], length: int) -> None:
    check_packing(LAYOUTS[layout](documents, length=length, pad=77), documents, length)


@given(documents=documents_of, length=st.integers(2, 10))
def test_rows_are_full_but_for_the_last(documents: list[list[int]], length: int) -> None:
    rows = packed(documents, length=length)
    assert len(rows) == -(-sum(map(len, documents)) // length)
    flat = [token for number in range(len(rows)) for token in rows[number]["input_ids"].tolist()]
    joined = list(itertools.chain(*documents))
    assert flat[: len(joined)] == joined


@given(documents=documents_of, length=st.integers(2, 10))
def test_a_document_that_fits_is_not_cut(documents: list[list[int]], length: int) -> None:
    rows = best_fit(documents, length=length)
    segments = Counter(segment.document for number in range(len(rows)) for segment in rows.segments(number))
    assert segments == {number: -(-len(document) // length) for number, document in enumerate(documents) if document}


def slow_best_fit(lengths: list[int], length: int) -> list[int]:
    """The published procedure, by looking at every row: the room that each row is left with."""
    rooms: list[int] = []
    for size in sorted((min(length, n - start) for n in lengths for start in range(0, n, length)), reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(length - size)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any), length=st.integers(2, 20))
def test_best_fit_is_the_published_procedure(lengths: list[int], length: int) -> None:
    rows = best_fit([[1] * n for n in lengths], length=length)
    used = [sum(segment.stop - segment.start for segment in rows.segments(number)) for number in range(len(rows))]
    assert sorted(length - n for n in used) == slow_best_fit(lengths, length)


@pytest.mark.parametrize("plant", ["lost", "doubled"])
def test_the_law_catches_a_layout_that_is_one_off(plant: str) -> None:
    rows = packed(DOCUMENTS, length=4)
    right = rows._layout
    shift = 1 if plant == "lost" else -1
    wrong = Packed(
        DOCUMENTS,
        rows.lengths,
        4,
        len(rows),
        0,
        lambda row: right(row) if row != 1 else [type(p)(p.document, p.start + shift, p.stop) for p in right(row)],
    )
    with pytest.raises((AssertionError, ValueError)):
        check_packing(wrong, DOCUMENTS, 4)


def test_documents_may_be_mappings_arrays_or_tensors() -> None:
    expected = packed(DOCUMENTS, length=4)
    for convert in (lambda d: {"input_ids": d}, lambda d: np.array(d, np.uint16), lambda d: torch.tensor(d)):
        rows = packed([convert(document) for document in DOCUMENTS], length=4)
        assert all(torch.equal(rows[i]["input_ids"], expected[i]["input_ids"]) for i in range(len(rows)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_a_dataset_like_any_other(layout: str) -> None:
    rows = LAYOUTS[layout](DOCUMENTS, length=4)
    check_data(ff.batches(rows, batch_size=2))
    mixed = ff.data.mixture({"packed": rows, "same": rows}, weights={"packed": 1, "same": 2})
    check_data(ff.batches(mixed, batch_size=2))


@pytest.mark.parametrize("how", ["position_ids", "block_mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_forward_is_that_of_each_document(layout: str, how: str) -> None:
    """Law: logits of a packed batch are those of its segments alone; so is the loss of all."""
    torch.manual_seed(0)
    model: Any = specimens.llama().double().eval()
    rows = LAYOUTS[layout](DOCUMENTS, length=8)
    batch = next(ff.batches(rows, batch_size=len(rows), order="sequential").start(0, 0)).data
    mask = {"attention_mask": ff.data.block_mask(batch["position_ids"])} if how == "block_mask" else {}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **mask).logits
    total, weight = torch.zeros((), dtype=torch.float64), 0
    for number in range(len(rows)):
        filled = 0
        for segment in rows.segments(number):
            tokens = torch.tensor([DOCUMENTS[segment.document][segment.start : segment.stop]])
            with torch.no_grad():
                alone = model(input_ids=tokens).logits
            size = tokens.shape[1]
            torch.testing.assert_close(logits[number, filled : filled + size], alone[0], rtol=0, atol=1e-10)
            total += F.cross_entropy(alone[0, :-1], tokens[0, 1:], reduction="sum") if size > 1 else 0.0
            weight += size - 1
            filled += size
    mean = ff.losses.causal_lm(logits, batch)
    assert int(mean.weight) == weight
    torch.testing.assert_close(mean.total, total, rtol=0, atol=1e-10)


def test_without_positions_documents_see_each_other() -> None:
    """What the law above would not hold for."""
    torch.manual_seed(0)
    model: Any = specimens.llama().double().eval()
    row = {name: column[None] for name, column in packed(DOCUMENTS, length=8)[0].items()}
    with torch.no_grad():
        apart = model(input_ids=row["input_ids"], position_ids=row["position_ids"]).logits
        together = model(input_ids=row["input_ids"]).logits
    assert (apart - together).abs().max() > 1e-4


def test_sdpa_takes_the_mask() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind(0)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=ff.data.block_mask(positions))
    for row, cuts in enumerate(([3, 2], [1, 4])):
        parts = [tensor[row : row + 1].split(cuts, dim=2) for tensor in (q, k, v)]
        alone = [F.scaled_dot_product_attention(*part, is_causal=True) for part in zip(*parts, strict=True)]
        torch.testing.assert_close(found[row : row + 1], torch.cat(alone, 2), rtol=0, atol=1e-12)


@given(documents=documents_of, length=st.integers(2, 10))
def test_flash_arguments_bound_the_segments(documents: list[list[int]], length: int) -> None:
    rows = packed(documents, length=length)
    batch = torch.stack([rows[number]["position_ids"] for number in range(len(rows))])
    found = ff.data.flash_arguments(batch)
    sizes = [p.stop - p.start for number in range(len(rows)) for p in rows.segments(number)]
    sizes += [length * len(rows) - sum(sizes)] * (sum(sizes) < length * len(rows))
    assert found["cu_seq_lens_q"].tolist() == [0, *itertools.accumulate(sizes)]
    assert found["max_length_k"] == max(sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("documents", "given", "message"),
    [
        (DOCUMENTS, {"length": 0}, "at least 2"),
        ([[], []], {}, "nothing to pack"),
        (DOCUMENTS, {"lengths": [1, 2]}, "expected one for each of 6 documents"),
        (DOCUMENTS, {"lengths": [3, 1, 7, -1, 2, 4]}, "integers of at least 0, one for each"),
        ([{"ids": [1]}], {}, r"no 'input_ids', but \['ids'\]"),
        ("text", {}, "a str is no collection of documents"),
        (iter(DOCUMENTS), {}, "is no collection of documents"),
    ],
)
def test_what_cannot_be_packed_is_refused(layout: str, documents: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout](documents, **{"length": 4, **given})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_of_another_length_is_refused(layout: str) -> None:
    rows = LAYOUTS[layout](DOCUMENTS, length=4, lengths=[3, 2, 7, 0, 2, 4])
    with pytest.raises(ValueError, match="document 1 has 1 tokens, but its length was given as 2"):
        [rows[number] for number in range(len(rows))]
