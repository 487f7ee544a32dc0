import pytest
import torch

from forgather_fn.optim.rounding import bfloat16_bits, chances, drawn, salt_of

VALUES = torch.tensor([1.0, 1.001, -1.001, 3.14159, -1e-20, 7e20, 0.0, 1 / 3, 255.9])


def test_a_number_becomes_one_of_its_neighbours_in_proportion():
    # All 2**16 chances, each once: the mean is the number itself, exactly but for the sum's rounding.
    every = torch.arange(2**16)
    for value in VALUES:
        rounded = bfloat16_bits(value.expand(2**16).contiguous(), every)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert len(rounded.unique()) <= 2
        assert rounded.double().mean().item() == pytest.approx(value.item(), rel=1e-7)
    assert torch.equal(bfloat16_bits(torch.tensor([1.5]), torch.tensor([2**16 - 1])), torch.tensor([1.5]))


def test_chances_are_uniform_and_independent():
    index = torch.arange(200_000)
    draws = {
        (step, seed, name): chances(drawn(index, step, seed), salt_of(name)).double() / 2**16
        for step, seed, name in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 2**32, "a"), (5, 7, "c")]
    }
    for draw in draws.values():
        assert draw.mean() == pytest.approx(0.5, abs=0.003)
        counts = torch.histc(draw, bins=64, min=0.0, max=1.0)
        assert ((counts - 3125).square() / 3125).sum() < 120  # chi-squared, 63 degrees of freedom
        for lag in (1, 2, 7, 64, 1024):
            assert torch.corrcoef(torch.stack([draw[lag:], draw[:-lag]]))[0, 1].abs() < 0.01
    correlations = torch.corrcoef(torch.stack(list(draws.values())))
    assert (correlations - torch.eye(len(draws))).abs().max() < 0.01


def test_chances_are_the_same_for_tensors_as_for_numbers():
    index = torch.arange(100).view(4, 25)
    seed = 2**62 + 12345
    one = chances(drawn(index, 3, seed), salt_of("x"))
    assert torch.equal(one, chances(drawn(index, torch.tensor(3), torch.tensor(seed)), salt_of("x")))
    assert torch.equal(one.view(-1), chances(drawn(index.view(-1), 3, seed), salt_of("x")))
    assert one.min() >= 0
    assert one.max() < 2**16
