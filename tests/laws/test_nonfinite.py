"""A step that is not finite changes nothing, and an optimizer that does not heed the flag is caught."""

from typing import Any

import pytest
import torch

import forgather_fn as ff
from forgather_fn.testing import check_nonfinite, check_step
from tests import zoo

OPTIMIZERS = {
    "adamw": ff.adamw(),
    "sgd": ff.sgd(momentum=0.9),
    "lookahead": ff.optim.lookahead(ff.adamw(), steps=1),
    "torch": ff.from_torch(torch.optim.RMSprop),
}


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "gpt2"])
def test_it_holds_of_models(name: str) -> None:
    check_nonfinite(zoo.plan_of(name, average=ff.ema(0.9)), zoo.SPECIMENS[name].batch(5))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_it_holds_of_optimizers(optimizer: ff.Optimizer) -> None:
    check_nonfinite(zoo.plan_of("mlp", optimizer=optimizer, microbatches=2), zoo.SPECIMENS["mlp"].batch(5))


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"donate": False}], ids=str)
def test_it_holds_of_plans(changes: dict[str, Any]) -> None:
    check_nonfinite(zoo.plan_of("mlp", **changes), zoo.SPECIMENS["mlp"].batch(5))


def test_what_cannot_leave_steps_out_is_outside() -> None:
    plan, batch = zoo.plan_of("mlp", update="in_backward"), zoo.SPECIMENS["mlp"].batch(5)
    with pytest.raises(ValueError, match="cannot be left out"):
        check_nonfinite(plan, batch)


def heedless(gradients: Any, state: Any, params: Any, context: Any) -> Any:
    for name, gradient in gradients.items():
        params[name].sub_(gradient, alpha=0.1)
    return state


def test_an_optimizer_that_does_not_heed_the_flag_is_caught() -> None:
    optimizer = ff.Optimizer(lambda params: {}, heedless)
    plan, batch = zoo.plan_of("mlp", optimizer=optimizer), zoo.SPECIMENS["mlp"].batch(5)
    with pytest.raises(AssertionError, match=r"nonfinite: step 1 .*gradients of nan changed the state: params/"):
        check_nonfinite(plan, batch)
    with pytest.raises(AssertionError, match="nonfinite"):
        check_step(plan, batch)


def test_a_step_that_is_not_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from forgather_fn import step

    flag = step.flag_on_host
    monkeypatch.setattr(step, "flag_on_host", lambda *given: flag(*given)._replace(skipped=None))
    with pytest.raises(AssertionError, match=r"state\.skipped went from 0 to 0"):
        check_nonfinite(zoo.plan_of("mlp"), zoo.SPECIMENS["mlp"].batch(5))
