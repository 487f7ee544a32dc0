from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.batch import as_batch, microbatches, placed
from forgather_fn.data import Batch
from forgather_fn.share import Microbatches

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["one", "other"])


@given(st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_parts_are_near_equal_in_order_and_complete(samples, count, ragged):
    batch = Batch((torch.arange(samples), {"row": torch.arange(samples)[:, None]}), samples, None, ragged)
    if samples < count and not ragged:
        with pytest.raises(ValueError, match=f"microbatches={count}, but the batch has {samples} samples"):
            microbatches(batch, count)
        return
    parts = microbatches(batch, count)
    sizes = [len(part[0]) for part in parts]
    assert len(parts) == min(samples, count)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert torch.cat([part[0] for part in parts]).tolist() == list(range(samples))
    assert torch.cat([part[1]["row"] for part in parts]).flatten().tolist() == list(range(samples))


def test_one_microbatch_is_the_data_itself():
    data = {"x": torch.zeros(3), "other": torch.zeros(5)}
    assert microbatches(Batch(data, 3, None), 1)[0] is data


def test_structure_is_kept_and_what_has_no_rows_goes_to_every_part():
    data = Pair({"x": torch.arange(4), "names": list("abcd"), "mode": "train", "scale": torch.tensor(2.0)}, [None, 3])
    first, second = microbatches(Batch(data, 4, None), 2)
    assert isinstance(first, Pair)
    assert first.one["x"].tolist() == [0, 1]
    assert second.one["x"].tolist() == [2, 3]
    assert (first.one["names"], second.one["names"]) == (["a", "b"], ["c", "d"])
    for part in (first, second):
        assert (part.one["mode"], part.one["scale"].item(), part.other) == ("train", 2.0, [None, 3])


def test_a_list_of_tensors_is_a_structure_and_not_rows():
    first, _ = microbatches(Batch([torch.arange(2), torch.arange(2)], 2, None), 2)
    assert [column.tolist() for column in first] == [[0], [0]]


def test_a_tensor_of_another_length_is_refused_by_its_path():
    data = {"x": torch.zeros(4), "more": (torch.zeros(4), torch.zeros(3))}
    with pytest.raises(ValueError, match=r"batch/more/1 has leading dimension 3, but the batch has 4 samples"):
        microbatches(Batch(data, 4, None), 2)


def test_plain_data_counts_its_leading_dimension():
    batch = as_batch({"x": torch.zeros(3, 2)})
    assert (batch.samples, batch.indices, batch.ragged) == (3, None, False)
    assert as_batch(batch) is batch


def test_placing_shares_what_is_there_and_converts_floating_tensors_only():
    data = Pair({"x": torch.zeros(3), "n": torch.zeros(3, dtype=torch.long), "s": "text"}, [torch.zeros(2), (1, None)])
    same = placed(data, CPU, None)
    assert isinstance(same, Pair)
    assert same.one["x"] is data.one["x"]
    wide = placed(data, CPU, torch.float64)
    assert (wide.one["x"].dtype, wide.one["n"].dtype, wide.other[0].dtype) == (torch.float64, torch.long, torch.float64)
    assert wide.other[1] == (1, None)
    assert wide.one["s"] == "text"
    assert data.one["x"].dtype == torch.float32


def test_parts_of_different_shapes_stay_as_they_came():
    parts = Microbatches(({"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 5)}))
    moved = placed(parts, CPU, torch.float64)
    assert [part["x"].dtype for part in moved.items] == [torch.float64] * 2
    found = microbatches(Batch(moved, 3, None), 4)
    assert [tuple(part["x"].shape) for part in found] == [(2, 3), (1, 5)]


@pytest.mark.parametrize("count", [0, 3])
def test_more_parts_than_microbatches_are_refused(count):
    with pytest.raises(ValueError, match=f"comes as {count} microbatches, but the plan has microbatches=2"):
        microbatches(Batch(Microbatches((torch.zeros(1),) * count), 3, None), 2)
