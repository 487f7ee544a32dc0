import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.random import key, seeded

CPU = torch.device("cpu")
parts = st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4).map(tuple)


@given(st.integers(), parts, st.integers(), parts)
def test_only_equal_paths_share_a_key(seed, path, other_seed, other_path):
    def typed(*items):
        return [(type(item), item) for item in items]

    same = typed(seed, *path) == typed(other_seed, *other_path)
    assert (key(seed, *path) == key(other_seed, *other_path)) is same


@given(st.integers(), parts)
def test_a_key_fits_the_generators_of_torch_and_numpy(seed, path):
    value = key(seed, *path)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)
    np.random.default_rng(value)


def test_keys_do_not_change_between_releases():
    # A run that goes on with a newer version must see the same dropout: whoever changes these numbers breaks that.
    assert key(0) == 2631537505891389924
    assert key(7, 3, 1, "forward") == 4656808701719422118


def test_keys_do_not_depend_on_the_process():
    code = "from forgather_fn.random import key; print(key(7, 3, 'forward', 'ä'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == key(7, 3, "forward", "ä")


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), np.uint8(3)])
def test_a_number_of_numpy_is_the_same_part_as_one_of_python(number):
    assert key(number, 1) == key(3, 1)
    assert key(0, number) == key(0, 3)


def test_neighbouring_keys_are_not_correlated():
    bits = np.array([[key(seed, step) >> bit & 1 for bit in range(63)] for seed in range(20) for step in range(50)])
    assert abs(bits.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(bits.T) - np.eye(63)).max() < 0.2


def test_a_seeded_block_draws_the_same_numbers_and_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    draws = []
    for _ in range(2):
        with seeded(5, CPU):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], expected)
    assert torch.equal(torch.rand(3), expected)


def test_generators_are_put_back_when_a_seeded_block_fails():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected a non-empty"), seeded(5, CPU):
        torch.cat([torch.rand(3)][:0])
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_blocks_nest():
    with seeded(5, CPU):
        torch.rand(1)
        outer = torch.rand(3)
    with seeded(5, CPU):
        torch.rand(1)
        with seeded(6, CPU):
            torch.rand(7)
        assert torch.equal(torch.rand(3), outer)
