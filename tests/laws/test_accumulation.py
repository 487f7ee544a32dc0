"""Law 3: microbatches with ragged weights equal one big batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.testing import check_accumulation
from tests import specimens, zoo

INSIDE = sorted(name for name, specimen in zoo.SPECIMENS.items() if specimen.outside is None)
OUTSIDE = sorted(set(zoo.SPECIMENS) - set(INSIDE))


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", INSIDE)
@settings(max_examples=3)
@given(data=st.data(), samples=st.integers(3, 9))
def test_microbatches_equal_one_batch(name: str, storage: str, data: st.DataObject, samples: int) -> None:
    parts = data.draw(st.lists(st.integers(1, samples), min_size=1, max_size=2, unique=True))
    check_accumulation(data.draw(zoo.plans(name, storage)), zoo.SPECIMENS[name].batch(samples), microbatches=parts)


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_is_named(name: str) -> None:
    specimen = zoo.SPECIMENS[name]
    assert specimen.outside is not None
    with pytest.raises(
        ValueError, match=rf"accumulation: \w+ {'has' if name == 'batchnorm' else ''} ?{specimen.outside}"
    ):
        check_accumulation(zoo.plan_of(name), specimen.batch(6))


def test_batch_statistics_in_evaluation_mode_are_inside() -> None:
    model = zoo.instance("batchnorm")
    model.get_submodule("1").eval()
    check_accumulation(zoo.plan_of("batchnorm", model=model), zoo.SPECIMENS["batchnorm"].batch(6))


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_both_storages_give_the_same_gradient(name: str, microbatches: int) -> None:
    batch, found = zoo.SPECIMENS[name].batch(7), []
    for viewed in zoo.STORAGES.values():
        plan = zoo.plan_of(name, viewed_elements=viewed, precision="float64", microbatches=microbatches)
        program = ff.single(plan)
        found.append(program.gradients(program.init(0), batch)[0])
    one, other = found
    assert set(one) == set(other)
    for leaf in one:
        torch.testing.assert_close(one[leaf], other[leaf], rtol=1e-12, atol=1e-15)


class Centred(nn.Module):
    """Batch statistics that have no name: subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.body(x - x.mean(0))


def test_hidden_batch_statistics_are_measured() -> None:
    plan = zoo.plan_of("mlp", model=Centred)
    pattern = (
        r"2 microbatches of 4, 3 samples \(weights 3, 2\) do not .* the gradient of body.weight differs by .*mixes"
    )
    with pytest.raises(AssertionError, match=pattern):
        check_accumulation(plan, zoo.SPECIMENS["mlp"].batch(7))


def test_a_weight_that_is_not_what_the_total_sums_over_is_caught() -> None:
    # The model's loss is a mean over labelled samples, but the plan says that it is one over all of them.
    def batch() -> dict[str, Tensor]:
        x, y = specimens.ragged_classes(7)
        return {"x": x, "y": y}

    wrong = zoo.plan_of("mlp_own_loss")
    with pytest.raises(AssertionError, match="the loss's weight is not what its total is a sum over"):
        check_accumulation(wrong, batch())
    right = zoo.plan_of("mlp_own_loss", loss=ff.losses.from_output(weight="tokens"))
    check_accumulation(right, batch())


def test_a_loss_in_float32_needs_a_tolerance_and_says_so() -> None:
    def model() -> nn.Module:
        made = specimens.gpt2()
        del made._loss_function  # transformers' own, which converts logits to float32
        return made

    plan, batch = zoo.plan_of("gpt2", model=model), zoo.SPECIMENS["gpt2"].batch(7)
    with pytest.raises(AssertionError, match="say tolerance=1e-5"):
        check_accumulation(plan, batch)
    check_accumulation(plan, batch, tolerance=1e-5)


def test_a_batch_that_cannot_be_cut_unequally_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 2 samples cannot be cut unequally; give at least 3"):
        check_accumulation(zoo.plan_of("mlp"), zoo.SPECIMENS["mlp"].batch(2))


def test_a_model_that_cannot_be_converted_gets_a_note() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            return self.body(x @ torch.eye(5))

    with pytest.raises(RuntimeError) as caught:
        check_accumulation(zoo.plan_of("mlp", model=Stubborn), zoo.SPECIMENS["mlp"].batch(4))
    assert "This law is checked in float64" in "".join(caught.value.__notes__)
