from typing import NamedTuple

import pytest
import torch

from forgather_fn import tree
from forgather_fn.flat import Flat, filled, layout_of


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


def flat():
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    return filled(layout_of(tensors), tensors, torch.device("cpu"))


def test_leaves_are_walked_in_order_with_their_paths():
    nested = {"a": [1, (2, {"b": 3})], "c": {}, "d": Pair(4, 5), "e": None}
    expected = [("a/0", 1), ("a/1/0", 2), ("a/1/1/b", 3), ("d/0", 4), ("d/1", 5), ("e", None)]
    assert list(tree.walk(nested)) == expected


def test_flat_storage_is_walked_by_name():
    assert [name for name, _ in tree.walk({"params": flat()})] == ["params/w", "params/b"]


def test_a_copy_shares_no_memory_and_keeps_the_structure():
    nested = {"a": (torch.ones(2), [torch.ones(3)]), "pair": Pair(torch.ones(1), torch.ones(1)), "n": 3, "flat": flat()}
    copy = tree.copied(nested)
    assert tree.difference(nested, copy) is None
    assert isinstance(copy["a"], tuple)
    assert isinstance(copy["a"][1], list)
    assert isinstance(copy["pair"], Pair)
    assert isinstance(copy["flat"], Flat)
    for (name, one), (_, other) in zip(tree.walk(nested), tree.walk(copy), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.data_ptr() != other.data_ptr(), name
    copy["flat"].buffers[0].zero_()
    assert nested["flat"]["w"].sum() == 15


def test_a_copy_leaves_the_graph():
    assert not tree.copied({"w": torch.ones(2, requires_grad=True) * 2})["w"].requires_grad


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b: 2 and 3"),
        ({"a": 1, "b": 2}, {"a": 1}, "b: only in the first"),
        ({"a": 1}, {"a": 1, "b": 2}, "b: only in the second"),
        ({"a": 1}, {"a": 1.0}, "a: 1 and 1.0"),
        ({"a": (1, 2)}, {"a": (1,)}, "a/1: only in the first"),
        ({"a": None}, {"a": torch.zeros(1)}, "a: None and"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, r"a: (2,) float32 and (3,) float32"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}, r"a: (2,) float32 and (2,) float64"),
        (
            {"x": torch.zeros(1), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
            {"x": torch.zeros(1), "a": torch.tensor([[1.0, 2.0], [3.5, 5.0]])},
            "a: 2 of 4 elements differ, by at most 1; the first at [1, 0]: 3.0 and 3.5",
        ),
        (
            {"a": torch.tensor(1)},
            {"a": torch.tensor(3)},
            "a: 1 of 1 elements differ, by at most 2; the first at []: 1 and 3",
        ),
        ({"a": torch.tensor([True])}, {"a": torch.tensor([False])}, "a: 1 of 1 elements differ"),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, "a: 1 of 1 elements differ, by at most 0"),
        ({"a": torch.tensor([1.0, torch.nan])}, {"a": torch.tensor([1.0, 2.0])}, "a: 1 of 2 elements differ"),
        ({"a": torch.ones(2).bfloat16()}, {"a": torch.tensor([1.0, 2.0]).bfloat16()}, "a: 1 of 2 elements differ"),
        ({"a": torch.tensor([1 + 2j])}, {"a": torch.tensor([1 + 3j])}, "a: 1 of 1 elements differ, by at most 1"),
    ],
)
def test_the_first_difference_is_named(one, other, message):
    assert str(tree.difference(one, other)).startswith(message)
    assert tree.difference(one, one) is None
    assert tree.difference(other, other) is None


@pytest.mark.parametrize(
    "leaf",
    [torch.empty(0), torch.empty(0, 3), torch.tensor(float("nan")), torch.tensor([torch.inf, torch.nan]), float("nan")],
    ids=str,
)
def test_equal_bits_are_equal(leaf):
    same = leaf.clone() if isinstance(leaf, torch.Tensor) else float("nan")
    assert tree.difference({"a": leaf}, {"a": same}) is None


def test_strides_do_not_count_as_a_difference():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert tree.difference(image, image.contiguous(memory_format=torch.channels_last)) is None
    assert tree.difference(image.mT, image.mT.contiguous()) is None


def test_a_size_counts_tensors_elements_and_bytes():
    assert tree.size({"a": torch.zeros(3), "b": (torch.zeros(2).double(), 5), "c": torch.zeros(0)}) == (3, 5, 28)
    assert tree.size(flat()) == (2, 9, 36)
    assert tree.size(None) == (0, 0, 0)


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_gate_takes_all_of_the_new_tree_or_all_of_the_old(flag):
    old = {"a": torch.zeros(2), "b": (torch.zeros(1), [torch.tensor(0)]), "pair": Pair(torch.zeros(1), torch.zeros(1))}
    new = {"a": torch.ones(2), "b": (torch.ones(1), [torch.tensor(1)]), "pair": Pair(torch.ones(1), torch.ones(1))}
    taken = tree.gated(torch.tensor(flag), old, new)
    assert tree.difference(taken, old if flag else new) is None
    assert isinstance(taken["pair"], Pair)


def test_a_gate_keeps_out_what_is_not_finite():
    kept = tree.gated(torch.tensor(1.0), {"a": torch.ones(2)}, {"a": torch.full((2,), torch.nan)})
    assert torch.equal(kept["a"], torch.ones(2))


@pytest.mark.parametrize("flag", [0.0, 1.0])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"n": 0, "same": None}, {"n": 1, "same": None}),
        (None, torch.zeros(2)),
        (torch.zeros(2), torch.zeros(3)),
        (((),), ((1,),)),
        ({"a": {}}, {"a": {"b": 1}}),
        ({"a": 1}, {}),
        ((), {}),
    ],
)
def test_a_gate_chooses_what_is_no_tensor_of_one_shape_too(old, new, flag):
    assert tree.difference(tree.gated(torch.tensor(flag), old, new), old if flag else new) is None
