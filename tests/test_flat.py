import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.flat import ALIGNMENT, Hyper, filled, layout_of, listed, write, zeros

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
HYPERS = (Hyper(), Hyper(weight_decay=0.1), Hyper(learning_rate=2.0))

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
leaves = st.lists(
    st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from(HYPERS), st.booleans()), min_size=1, max_size=8
)


def make(rows):
    """Draw tensors of these shapes and types, some of them with permuted strides."""
    generator = torch.Generator().manual_seed(0)
    tensors, hypers = {}, {}
    for i, (shape, dtype, hyper, turned) in enumerate(rows):
        tensor = torch.rand(shape, generator=generator).add(1).to(dtype)
        tensors[f"t{i}"] = tensor.transpose(0, -1) if turned and tensor.dim() > 1 else tensor
        hypers[f"t{i}"] = hyper
    return tensors, hypers


@given(leaves)
def test_what_is_written_is_read_and_the_padding_is_zero(rows):
    tensors, hypers = make(rows)
    flat = filled(layout_of(tensors, hypers), tensors, CPU)
    assert list(flat) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(flat[name], tensor)
        assert flat[name].dtype == tensor.dtype
        assert flat[name] is flat[name]
    assert sum(int((buffer != 0).sum()) for buffer in flat.buffers) == sum(t.numel() for t in tensors.values())


@given(leaves)
def test_places_are_aligned_and_do_not_overlap(rows):
    tensors, hypers = make(rows)
    layout = layout_of(tensors, hypers)
    assert layout.elements == sum(tensor.numel() for tensor in tensors.values())
    ends = [0] * len(layout.sizes)
    for leaf in sorted(layout.leaves, key=lambda leaf: (leaf.buffer, leaf.offset)):
        assert leaf.offset == ends[leaf.buffer]
        assert leaf.offset * leaf.dtype.itemsize % ALIGNMENT == 0
        assert leaf.extent >= math.prod(leaf.shape)
        assert layout.groups[leaf.group] == hypers[leaf.name]
        ends[leaf.buffer] += leaf.extent
    assert tuple(ends) == layout.sizes
    everything = (True,) * len(rows)
    assert len(layout.runs(everything)) == len({(leaf.buffer, leaf.group) for leaf in layout.leaves})


@given(leaves, st.data())
def test_chunks_cover_the_active_leaves_and_nothing_else(rows, data):
    tensors, hypers = make(rows)
    layout = layout_of(tensors, hypers)
    active = tuple(data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors))))
    expected = zeros(layout, CPU)
    for leaf, on in zip(layout.leaves, active, strict=True):
        if on:
            expected.buffers[leaf.buffer][leaf.offset : leaf.offset + leaf.extent] = 1
    for chunks in (layout.runs(active), layout.spans(active)):
        marked = zeros(layout, CPU)
        for chunk, piece in zip(chunks, marked.slices(chunks), strict=True):
            piece += 1
            assert active[chunk.first]
            assert layout.leaves[chunk.first].group == chunk.group
            assert layout.leaves[chunk.first].offset == chunk.start
        assert all(torch.equal(one, other) for one, other in zip(marked.buffers, expected.buffers, strict=True))
    names = [leaf.name for leaf, on in zip(layout.leaves, active, strict=True) if on]
    whole = zeros(layout, CPU)
    singles = layout.singles(active)
    assert [chunk.name for chunk in singles] == names
    assert all(piece is whole[name] for piece, name in zip(whole.slices(singles), names, strict=True))


def test_leaves_of_one_group_are_one_run():
    tensors = {name: torch.zeros(3) for name in "abcd"}
    hypers = {name: Hyper(weight_decay=0.1 if name in "ac" else 0.0) for name in "abcd"}
    layout = layout_of(tensors, hypers)
    assert len(layout.runs((True,) * 4)) == 2
    assert len(layout.runs((True, True, True, False))) == 2
    assert len(layout.spans((True,) * 4)) == 4
    assert layout.runs((True,) * 4) is layout.runs((True,) * 4)
    assert layout.runs((False,) * 4) == ()


def test_the_memory_of_cuts_is_bounded():
    layout = layout_of({str(i): torch.zeros(1) for i in range(7)})
    for code in range(128):
        active = tuple(bool(code >> bit & 1) for bit in range(7))
        flat = zeros(layout, CPU)
        assert sum(chunk.stop - chunk.start for chunk in layout.runs(active)) == 64 * sum(active)
        flat.slices(layout.runs(active))
    assert len(layout._cuts) <= 32


def test_dense_strides_are_kept_and_others_become_contiguous():
    tensors = {
        "conv": torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "turned": torch.rand(3, 4).t(),
        "expanded": torch.rand(1, 4).expand(3, 4),
        "sliced": torch.rand(4, 8)[:, ::2],
    }
    flat = filled(layout_of(tensors), tensors, CPU)
    assert flat["conv"].is_contiguous(memory_format=torch.channels_last)
    assert flat["turned"].stride() == (1, 4)
    assert flat["expanded"].is_contiguous()
    assert flat["sliced"].is_contiguous()
    assert all(torch.equal(flat[name], tensor) for name, tensor in tensors.items())


def test_a_copy_and_a_map_have_memory_of_their_own():
    tensors, hypers = make([((2, 3), torch.float32, HYPERS[0], False), ((3,), torch.float64, HYPERS[1], False)])
    flat = filled(layout_of(tensors, hypers), tensors, CPU)
    copy, doubled = flat.copy(), flat.map(lambda buffer: buffer * 2)
    flat.buffers[0].zero_()
    assert torch.equal(copy["t0"], tensors["t0"])
    assert torch.equal(doubled["t1"], tensors["t1"] * 2)
    assert copy.layout is flat.layout
    flat.assign(copy)
    assert torch.equal(flat["t0"], tensors["t0"])


def test_flat_storage_is_a_read_only_mapping_with_a_short_repr():
    flat = filled(layout_of({"w": torch.ones(2000)}), {"w": torch.ones(2000)}, CPU)
    assert repr(flat) == "Flat(2,000 elements in 1 tensors)"
    assert "w" in flat
    assert len(flat) == 1
    with pytest.raises(KeyError):
        flat["v"]
    with pytest.raises(TypeError):
        flat["w"] = torch.zeros(2000)


def test_writing_needs_exactly_the_names_and_shapes():
    flat = zeros(layout_of({"a": torch.zeros(2), "b": torch.zeros(3)}), CPU)
    with pytest.raises(ValueError, match=r"missing 'b', unexpected 'c'"):
        write(flat, {"a": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"b: expected shape \(3,\), got \(4,\)"):
        write(flat, {"a": torch.zeros(2), "b": torch.zeros(4)})


def test_a_list_of_names_is_cut():
    assert listed(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"
