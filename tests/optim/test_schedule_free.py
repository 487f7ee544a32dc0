import pytest
import schedulefree
import torch

import forgather_fn as ff
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import Branches, branching, classifier, decaying, labelled, labelled_batches, program, unchanged


def theirs(weight_decay=0.1, **options):
    def make(model):
        optimizer = schedulefree.AdamWScheduleFree(decaying(model, weight_decay), foreach=False, **options)
        optimizer.train()
        return optimizer

    return make


@STORAGES
@DTYPES
@pytest.mark.parametrize(
    ("ours", "options"),
    [
        ({}, {}),
        ({"betas": (0.95, 0.99), "power": 1.0}, {"betas": (0.95, 0.99), "r": 1.0}),
        ({"rate_power": 0.0, "eps": 1e-3}, {"weight_lr_power": 0.0, "eps": 1e-3}),
    ],
)
def test_every_step_is_that_of_the_package(viewed_elements, dtype, ours, options):
    # The learning rate begins at 0, where the package divides by zero and catches it, and falls again.
    compare(
        ff.optim.schedule_free_adamw(weight_decay=0.1, **ours),
        theirs(**options),
        dtype=dtype,
        viewed_elements=viewed_elements,
        atol={torch.float32: 5e-6, torch.float64: 1e-11}[dtype],
    )


@STORAGES
def test_gradients_that_come_and_go(viewed_elements):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate([(1, 1), (0, 1), (1, 0), (1, 1)] * 3)]
    compare(
        ff.optim.schedule_free_adamw(weight_decay=0.1),
        theirs(),
        model=lambda dtype: Branches().to(dtype),
        batches=batches,
        viewed_elements=viewed_elements,
        atol=1e-11,
    )


def test_the_average_is_what_is_evaluated_applied_and_exported():
    optimizer = ff.optim.schedule_free_adamw(weight_decay=0.1)
    made = program(classifier(torch.float64), optimizer=optimizer)
    state = ff.fold(made.step, made.init(0), labelled_batches(8, dtype=torch.float64))
    model = classifier(torch.float64)
    reference = theirs()(model)
    for batch in labelled_batches(8, dtype=torch.float64):
        reference.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        for row in reference.param_groups:
            row["lr"] = 1e-2
        reference.step()
    features, labels = labelled(9, seed=7, dtype=torch.float64)
    at_y = model(features).detach()
    reference.eval()
    at_x = model(features).detach()
    loss = torch.nn.functional.cross_entropy(at_x, labels).item()
    assert not torch.allclose(at_x, at_y, atol=1e-4)
    with unchanged(state):
        torch.testing.assert_close(made.apply(state, features), at_x, atol=1e-11, rtol=0.0)
        torch.testing.assert_close(made.export(state)(features).detach(), at_x, atol=1e-11, rtol=0.0)
        assert made.evaluate(state, [(features, labels)]) == {"loss": pytest.approx(loss, rel=1e-9)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.0, 0.9)}, r"must be a number in \(0, 1\)"),
        ({"betas": (lambda step: 0.9, 0.9)}, r"betas must be \(a number, a number or a function"),
        ({"betas": (0.9, 1.0)}, "schedule_free_adamw: betas must be two numbers"),
        ({"rate_power": -1.0}, "powers must be at least 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ff.optim.schedule_free_adamw(**options)
