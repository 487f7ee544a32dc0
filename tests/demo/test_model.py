"""The transformer: what it may see, how it tells positions apart, and how it starts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from forgather_fn.demo.model import Attention, Transformer, rotated, rotations

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(width=32, layers=2, heads=4)
    # At the start the blocks hardly write to the stream: what goes wrong in them would not show.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def some_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("place", [0, 1, 7, 11])
def test_logits_depend_on_the_bytes_up_to_them_and_on_no_later_one(model, place):
    text = some_bytes(2, 12)
    changed = text.clone()
    changed[:, place] = (changed[:, place] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert ((before[:, place:] - after[:, place:]).abs().amax(dim=-1) > 1e-6).all()


def test_the_rows_of_a_batch_do_not_see_each_other(model):
    text = some_bytes(3, 9)
    alone = torch.cat([model(row[None]) for row in text])
    torch.testing.assert_close(model(text), alone, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_past_matters(model):
    text = some_bytes(1, 8)
    swapped = text[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(text)[0, -1], model(swapped)[0, -1], atol=1e-3)


@given(distance=st.integers(0, 40), start=st.integers(0, 80), moved=st.integers(0, 80))
def test_a_turned_query_and_key_meet_by_their_distance_alone(distance, start, moved):
    query, key = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    angles = rotations(128, 16, CPU).double()

    def score(at: int) -> torch.Tensor:
        return rotated(query[None], angles[:, at + distance, None]) @ rotated(key[None], angles[:, at, None]).mT

    torch.testing.assert_close(score(start), score(moved), rtol=0, atol=1e-4)


def test_distances_are_told_apart():
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    angles = rotations(128, 16, CPU)
    scores = rotated(query.expand(128, 16), angles) @ key
    assert torch.unique(scores.round(decimals=4)).numel() > 120


def test_rotation_keeps_lengths_and_data_types_and_begins_at_none():
    x = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(3))
    angles = rotations(10, 8, CPU)
    turned = rotated(x, angles)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert rotated(x.bfloat16(), angles).dtype is torch.bfloat16


def test_the_angles_are_those_of_the_paper():
    cos, sin = rotations(5, 6, CPU)
    for position in range(5):
        for pair in range(3):
            angle = position * 10_000 ** (-2 * pair / 6)
            assert cos[position, pair] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[position, pair] == pytest.approx(math.sin(angle), abs=1e-6)


def test_attention_is_a_causal_softmax_of_each_head():
    torch.manual_seed(4)
    attention = Attention(width=12, heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    angles = rotations(7, 4, CPU)
    queries, keys, values = (F.linear(x, weight) for weight in attention.input.weight.chunk(3))
    heads = []
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        query, key = rotated(queries[..., own], angles), rotated(keys[..., own], angles)
        scores = query @ key.mT / 2.0
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
        heads.append(scores.softmax(dim=-1) @ values[..., own])
    expected = F.linear(torch.cat(heads, dim=-1), attention.output.weight)
    torch.testing.assert_close(attention(x, angles), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 8])
def test_it_starts_by_knowing_nothing_whatever_its_depth(layers):
    torch.manual_seed(5)
    model = Transformer(width=64, layers=layers, heads=2)
    text = some_bytes(4, 64)
    loss = F.cross_entropy(model(text).flatten(0, 1), some_bytes(4, 64).roll(1).flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)
    stream = {}
    for name in ("embedding", f"blocks.{layers - 1}"):
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: stream.update({name: out.std()}))
    model(text)
    first, last = stream.values()
    assert last / first < 2.0


def test_every_parameter_is_trained(model):
    model(some_bytes(2, 16)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("width", "heads", "nearest"), [(130, 4, "128 or 136"), (12, 4, "8 or 16"), (5, 4, "8"), (31, 1, "30 or 32")]
)
def test_a_width_that_the_heads_do_not_divide_is_refused(width, heads, nearest):
    with pytest.raises(
        ValueError, match=f"width={width} cannot be divided among heads={heads}: .* Nearest: {nearest}$"
    ):
        Transformer(width=width, layers=1, heads=heads)
