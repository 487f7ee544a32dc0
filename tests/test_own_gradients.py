"""``program.update`` takes gradients that the user has computed."""

from typing import Any

import attrs
import pytest
import torch

import forgather_fn as ff
from tests import zoo


def by_autograd(name: str, state: ff.TrainState, batch: Any) -> dict[str, torch.Tensor]:
    """Take the gradient of the mean loss by hand, on a copy of the module."""
    module = zoo.instance(name)
    loss: Any = zoo.SPECIMENS[name].loss
    mean = loss(module(batch[0]), batch)
    (mean.total / mean.weight).backward()
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None and k in state.params}


CASES = [(name, False) for name in ("mlp", "groupnorm", "tied_by_object", "partly_frozen", "unused")]


@pytest.mark.parametrize(("name", "compile"), [*CASES, ("unused", True)])
def test_gradients_by_hand_lead_where_a_step_leads(name: str, compile: bool) -> None:
    plan = zoo.plan_of(
        name,
        model=zoo.instance(name),
        transforms=(ff.clipped(0.1),),
        donate=False,
        compile=compile,
        backend="aot_eager",
    )
    program, batch = ff.single(plan), zoo.SPECIMENS[name].batch(6)
    state = program.init()
    expected, _ = program.step(state, batch)
    found, reports = program.update(state, by_autograd(name, state, batch), batch=batch)
    assert float(reports["grad_norm"]) > 0
    assert (found.step, found.samples) == (expected.step, expected.samples)
    for key, tensor in expected.params.items():
        torch.testing.assert_close(found.params[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    program = ff.single(zoo.plan_of("mlp", optimizer=ff.adamw(weight_decay=0.5), donate=False))
    state = program.init()
    given = {"0.weight": torch.ones(7, 5)}
    following, _ = program.update(state, given, batch=zoo.SPECIMENS["mlp"].batch(4))
    moved = {name for name, tensor in state.params.items() if not torch.equal(tensor, following.params[name])}
    assert moved == {"0.weight"}
    assert torch.equal(given["0.weight"], torch.ones(7, 5))
    assert following.samples == 4


@pytest.mark.parametrize(
    ("gradients", "batch", "message"),
    [
        ({"0.weight": torch.ones(7, 5)}, None, r"batch=\.\.\."),
        (
            {"0.wieght": torch.ones(7, 5)},
            torch.ones(4),
            r"no trained parameter '0\.wieght'; the parameters are '0\.weight'",
        ),
        (
            {"0.weight": torch.ones(5, 7)},
            torch.ones(4),
            r"0\.weight has the shape \(5, 7\), and the parameter \(7, 5\)",
        ),
    ],
    ids=["batch", "name", "shape"],
)
def test_what_does_not_fit_is_named(gradients: Any, batch: Any, message: str) -> None:
    program = ff.single(zoo.plan_of("mlp"))
    state = program.init()
    with pytest.raises(ValueError, match=message):
        program.update(state, gradients, batch=batch)
    assert not state.consumed


def test_gradients_of_a_step_know_their_batch() -> None:
    program = ff.single(attrs.evolve(zoo.plan_of("mlp"), donate=False))
    state = program.init()
    batch = zoo.SPECIMENS["mlp"].batch(4)
    gradients, buffers, _ = program.gradients(state, batch)
    with pytest.raises(ValueError, match="know which batch they are of"):
        program.update(state, gradients, buffers, batch=batch)


MEMBERS: dict[str, dict[str, Any]] = {
    "another model": {"model": zoo.SPECIMENS["groupnorm"].model},
    "other groups": {"optimizer": ff.adamw(weight_decay=0.1)},
    "no slots": {"optimizer": ff.sgd()},
    "an average": {"average": ff.ema(0.9)},
    "a transform": {"transforms": (ff.clipped(1.0),)},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", MEMBERS)
def test_a_state_of_another_plan_is_refused_as_by_a_step(how: str, own: bool) -> None:
    program, batch = ff.single(zoo.plan_of("mlp")), zoo.SPECIMENS["mlp"].batch(4)
    state = program.init()
    gradients, buffers, _ = program.gradients(state, batch)
    foreign = ff.single(zoo.plan_of("mlp", **MEMBERS[how])).init()
    given: Any = {name: torch.ones_like(one) for name, one in gradients.items()} if own else gradients
    options: dict[str, Any] = {"batch": batch} if own else {"buffers": buffers}
    with pytest.raises(ValueError, match=r"another (model or )?plan"):
        program.update(foreign, given, **options)
    assert not foreign.consumed


def test_buffers_that_no_step_gave_are_refused() -> None:
    program = ff.single(zoo.plan_of("mlp"))
    state = program.init()
    gradients, _, _ = program.gradients(state, zoo.SPECIMENS["mlp"].batch(4))
    with pytest.raises(ValueError, match=r"buffers are those that program\.gradients gave, or None; got dict"):
        program.update(state, gradients, {})
    assert not state.consumed
