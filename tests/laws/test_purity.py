"""Law 1: a step is a function of the state and the batch, for every specimen of the zoo."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.testing import check_purity
from tests import specimens, zoo


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
@settings(max_examples=3)
@given(data=st.data(), samples=st.integers(3, 7))
def test_the_same_call_gives_the_same_bits(name: str, storage: str, data: st.DataObject, samples: int) -> None:
    check_purity(data.draw(zoo.plans(name, storage)), zoo.SPECIMENS[name].batch(samples))


@pytest.mark.parametrize("name", ["dropout", "tied_by_storage", "batchnorm", "reassigning"])
def test_a_check_leaves_the_module_alone(name: str) -> None:
    module = zoo.instance(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    places = [tensor.data_ptr() for tensor in module.parameters()]
    modes = [part.training for part in module.modules()]
    check_purity(zoo.plan_of(name, model=module), zoo.SPECIMENS[name].batch(4))
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [tensor.data_ptr() for tensor in module.parameters()] == places
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_in_use_is_checked_as_it_stands() -> None:
    module = zoo.instance("tied_by_storage")
    plan = zoo.plan_of("tied_by_storage", model=module)
    program, batch = ff.single(plan), zoo.SPECIMENS["tied_by_storage"].batch(4)
    state, _ = program.step(program.init(0), batch)
    kept = state.copy()
    check_purity(plan, batch)
    assert ff.difference(state, kept) is None
    expected, _ = program.step(kept, batch)
    following, _ = program.step(state, batch)
    assert ff.difference(following, expected) is None


class Drawing(nn.Module):
    """Adds noise from a generator of one's choice."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + self.draw()


@pytest.mark.parametrize(
    ("draw", "named"),
    [(lambda: random.random(), "python's random"), (lambda: np.random.rand(), "numpy.random")],
    ids=["python", "numpy"],
)
def test_a_model_that_draws_from_another_generator_is_named(draw: Callable[[], float], named: str) -> None:
    plan = zoo.plan_of("mlp", model=Drawing(draw))
    with pytest.raises(AssertionError, match=rf"step 0 \(a batch of 4 samples, microbatches=1.*{named}"):
        check_purity(plan, zoo.SPECIMENS["mlp"].batch(4))


def test_a_model_may_draw_from_torchs_generator() -> None:
    check_purity(zoo.plan_of("mlp", model=Drawing(lambda: float(torch.rand(())))), zoo.SPECIMENS["mlp"].batch(4))


def test_a_factory_that_draws_elsewhere_is_named() -> None:
    def factory() -> nn.Module:
        model = nn.Linear(5, 3)
        nn.init.constant_(model.bias, random.random())
        return model

    with pytest.raises(AssertionError, match=r"two programs of one plan start from different states.*params/bias"):
        check_purity(zoo.plan_of("mlp", model=factory), zoo.SPECIMENS["mlp"].batch(4))


def test_a_loss_that_changes_the_batch_is_caught() -> None:
    def loss(outputs: Tensor, batch: Any) -> ff.Mean:
        batch[1].fill_(1)
        return ff.losses.cross_entropy(outputs, batch)

    with pytest.raises(AssertionError, match=r"changed the batch that it was given: 1: 3 of 4 elements differ"):
        check_purity(zoo.plan_of("mlp", loss=loss), zoo.SPECIMENS["mlp"].batch(4))


def test_a_model_that_cannot_be_copied_asks_for_a_factory() -> None:
    module = nn.Linear(5, 3)
    module.extra = module.weight * 2  # not a leaf
    with pytest.raises(ValueError, match=r"Linear cannot be copied .* a function that builds the model"):
        check_purity(zoo.plan_of("mlp", model=module), zoo.SPECIMENS["mlp"].batch(4))


class ByName(nn.Module):
    """Takes its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def test_what_a_batch_wraps_is_looked_at() -> None:
    def loss(outputs: Tensor, batch: Any) -> ff.Mean:
        batch["y"].fill_(1)
        return ff.losses.cross_entropy(outputs, batch)

    batch = ff.Batch(specimens.pairs_by_name(4), 4, np.arange(4))
    check_purity(zoo.plan_of("mlp_own_loss"), batch)
    with pytest.raises(AssertionError, match=r"changed the batch that it was given: y: . of 4 elements differ"):
        check_purity(zoo.plan_of("mlp_own_loss", model=ByName, loss=loss), batch)
