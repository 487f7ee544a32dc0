"""The laws of one step together, and that a step is gradients and update composed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.testing import check_step
from forgather_fn.testing.step import check_composition
from tests import zoo


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
@settings(max_examples=3)
@given(data=st.data(), samples=st.integers(3, 7))
def test_step_is_gradients_and_update(name: str, storage: str, data: st.DataObject, samples: int) -> None:
    check_composition(data.draw(zoo.plans(name, storage)), zoo.SPECIMENS[name].batch(samples), steps=3, seed=0)


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "dropout", "gpt2"])
def test_one_line_names_the_laws_that_it_checked(name: str) -> None:
    specimen = zoo.SPECIMENS[name]
    laws = check_step(zoo.plan_of(name, microbatches=2), specimen.batch(5))
    always = ("purity", "donation", "composition", "nonfinite", "evaluation")
    assert laws == (always if specimen.outside else (*always, "accumulation"))


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
def test_groups_with_hyperparameters_of_their_own(storage: str) -> None:
    groups = [ff.group("0.*", frozen=True), ff.group("*.bias", learning_rate=3.0, weight_decay=0.1)]
    plan = zoo.plan_of("mlp", optimizer=ff.adamw(groups=groups), viewed_elements=zoo.STORAGES[storage], microbatches=3)
    assert "accumulation" in check_step(plan, zoo.SPECIMENS["mlp"].batch(5))
