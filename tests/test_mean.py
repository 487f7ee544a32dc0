import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.mean import Mean, of, summed

rows = st.lists(st.tuples(st.integers(-100, 100), st.integers(1, 9)), min_size=1, max_size=12)


@given(rows, st.integers(1, 12))
def test_parts_of_any_size_add_up_to_the_whole(values, size):
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    means = [Mean(torch.tensor(float(sum(v * w for v, w in part))), sum(w for _, w in part)) for part in parts]
    expected = sum(v * w for v, w in values) / sum(w for _, w in values)
    assert float(summed(means)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_ragged_parts_count_by_their_weight():
    # The mean of means would be 3.0.
    assert float(Mean(torch.tensor(9.0), 9) + Mean(torch.tensor(5.0), 1)) == pytest.approx(1.4)


def test_weights_may_be_tensors():
    mean = Mean(torch.tensor(6.0), torch.tensor(2)) + Mean(torch.tensor(1.0), 5)
    assert float(mean) == 1.0


def test_a_mean_over_nothing_is_nan():
    assert math.isnan(float(Mean(torch.tensor(0.0), 0)))
    assert math.isnan(float(Mean(torch.tensor(0.0), torch.tensor(0))))


def test_a_mean_is_written_and_read_as_a_number_is():
    mean = Mean(torch.tensor(1.0), 8)
    assert (f"{mean:.3f}", f"{mean:8.2e}", mean.item()) == ("0.125", "1.25e-01", 0.125)
    assert f"{mean}" == str(mean) == repr(mean) == "Mean(total=tensor(1.), weight=8)"


def test_long_sums_of_detached_means_stay_exact():
    # 1 + 2**-25 is 1 in float32: ten million of such additions would be lost.
    part = Mean(torch.tensor(2.0**-25), 0).detach()
    total = summed([Mean(torch.tensor(1.0), 1).detach(), *[part] * 64])
    assert float(total) == 1 + 64 * 2.0**-25


def test_detaching_leaves_the_graph_of_total_and_weight():
    parameter = torch.tensor(2.0, requires_grad=True)
    mean = Mean(parameter * 3, parameter * 1).detach()
    assert not mean.total.requires_grad
    assert not torch.as_tensor(mean.weight).requires_grad
    assert mean.total.dtype == torch.float64
    assert float(mean) == 3.0


def test_a_value_can_be_differentiated():
    parameter = torch.tensor(2.0, requires_grad=True)
    Mean(parameter * 3, 6).value().backward()
    assert parameter.grad.item() == 0.5


def test_adding_changes_neither_side():
    one, other = Mean(torch.tensor(1.0), torch.tensor(1.0)), Mean(torch.tensor(2.0), torch.tensor(3.0))
    one + other
    assert (one.total.item(), one.weight.item(), other.total.item(), other.weight.item()) == (1.0, 1.0, 2.0, 3.0)


def test_no_means_cannot_be_added():
    with pytest.raises(ValueError, match="no means to add"):
        summed([])


def test_the_mean_over_a_tensor():
    values = torch.arange(6.0).reshape(2, 3)
    assert float(of(values)) == 2.5
    assert of(values).weight == 6
