import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import forgather_fn as ff
from forgather_fn.flat import layout_of
from forgather_fn.groups import Hyper
from forgather_fn.overlap import BUCKET_BYTES, buckets
from forgather_fn.testing.processes import processes


@pytest.fixture(scope="module")
def pair():
    with processes(2) as pool:
        yield pool


def layout(layers: int, width: int = 64, decays: bool = False):
    """Weights and biases, in two groups or in one."""
    tensors = {}
    for i in range(layers):
        tensors |= {f"{i}.weight": torch.zeros(width, width), f"{i}.bias": torch.zeros(width)}
    groups = {name: Hyper(0.1 if name.endswith("weight") else 0.0, 1.0) for name in tensors} if decays else None
    return layout_of(tensors, groups)


@pytest.mark.parametrize("layers", [1, 2, 7, 8])
@pytest.mark.parametrize("decays", [False, True])
def test_buckets_are_the_buffers_cut(layers, decays):
    made = layout(layers, decays=decays)
    cut = buckets(made)
    assert sorted(leaf for bucket in cut for leaf in bucket.leaves) == list(range(2 * layers))
    places = sorted((bucket.start, bucket.stop) for bucket in cut)
    assert [start for start, _ in places] == [0, *(stop for _, stop in places[:-1])]
    assert places[-1][1] == made.sizes[0]
    for bucket in cut:
        assert all(bucket.start <= made.leaves[i].offset < bucket.stop for i in bucket.leaves)


def test_the_last_layers_are_sent_first():
    assert [min(bucket.leaves) for bucket in buckets(layout(8))] == sorted(
        (min(bucket.leaves) for bucket in buckets(layout(8))), reverse=True
    )


def test_a_bucket_with_a_leaf_of_the_first_layer_is_sent_last():
    """Biases of all layers lie together, behind all weights: they are complete when the first layer is."""
    made = layout(8, decays=True)
    last = buckets(made)[-1]
    assert min(last.leaves) <= 1


def test_buckets_have_a_largest_size():
    made = layout(12, width=1600)
    sizes = [4 * (bucket.stop - bucket.start) for bucket in buckets(made)]
    assert max(sizes) < BUCKET_BYTES + 4 * 1600 * 1600 + 4 * 1600
    assert len(sizes) >= made.bytes // BUCKET_BYTES // 2


class Twice(nn.Module):
    """A model whose backward pass comes to the same parameter in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
        return self.second(checkpoint(self.first, x, use_reentrant=True))


def plan(model) -> ff.Plan:
    return ff.Plan(model=model, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.1, microbatches=2)


def stepped(kind) -> tuple[list[float], int]:
    program = ff.accelerated(plan(kind), overlap_bytes=0)
    state, _ = program.step(program.init(0), (torch.ones(4, 4), torch.zeros(4).long()))
    hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in program.module().parameters())
    return [float(p.sum()) for p in state.params.values()], hooks


def said() -> str:
    try:
        stepped(Twice)
    except RuntimeError as error:
        return str(error)
    return ""


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def test_no_hook_stays(pair):
    (one, hooks), other = pair.run(stepped, plain)
    assert other == (one, hooks)
    assert hooks == 0


def test_gradients_in_pieces_are_refused():
    with processes(2) as pool:
        assert all("use_reentrant=False" in text for text in pool.run(said))
    assert not distributed.is_initialized()
