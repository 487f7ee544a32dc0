"""The schedules that arguments name: the rates, and the arguments, of transformers' own."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from transformers import optimization as theirs

from forgather.ml.trainer.scheduling import get_scheduler

LR = 3e-4
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.3}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 8}),
    ("warmup_stable_decay", {"num_decay_steps": 8, "num_stable_steps": 3, "min_lr_ratio": 0.1}),
    *(
        ("warmup_stable_decay", {"num_decay_steps": 8, "warmup_type": rise, "decay_type": fall, "min_lr_ratio": 0.1})
        for rise, fall in itertools.product(("linear", "cosine", "1-sqrt"), repeat=2)
    ),
    ("warmup_stable_decay", {"num_decay_steps": 8, "num_cycles": 1.5}),
]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def rates(scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def made(module: Any, name: str, warmup: int, total: int, kwargs: dict[str, Any]) -> Any:
    make = theirs.get_scheduler if module is theirs else get_scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn of two lengths of the stable part
        return make(name, optimizer(), warmup, total, scheduler_specific_kwargs=dict(kwargs))


@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (1, 20), (5, 20), (19, 20), (30, 20), (0, 1), (6, 10)])
@pytest.mark.parametrize(("name", "kwargs"), KINDS, ids=[f"{name} {kwargs}" for name, kwargs in KINDS])
def test_rates_are_those_of_transformers(name: str, kwargs: dict[str, Any], warmup: int, total: int) -> None:
    expected = rates(made(theirs, name, warmup, total, kwargs), total)
    assert rates(made(None, name, warmup, total, kwargs), total) == pytest.approx(expected, rel=1e-9, abs=LR * 1e-12)


@pytest.mark.parametrize(("name", "kwargs"), KINDS, ids=[f"{name} {kwargs}" for name, kwargs in KINDS])
def test_arguments_can_be_read_as_there(name: str, kwargs: dict[str, Any]) -> None:
    ours, others = made(None, name, 5, 20, kwargs), made(theirs, name, 5, 20, kwargs)
    if name != "constant":  # which has a bare function there
        assert ours.lr_lambdas[0].args == others.lr_lambdas[0].args
        assert ours.lr_lambdas[0].keywords == others.lr_lambdas[0].keywords
    assert ours.state_dict().keys() == others.state_dict().keys()


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_are_those_of_transformers(name: str) -> None:
    kwargs = {"factor": 0.5, "patience": 1}
    ours, others = made(None, name, 0, 20, kwargs), made(theirs, name, 0, 20, kwargs)
    for metric in (3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.1, 1.2, 1.3):
        ours.step(metric)
        others.step(metric)
        assert ours.optimizer.param_groups[0]["lr"] == others.optimizer.param_groups[0]["lr"]
    assert ours.optimizer.param_groups[0]["lr"] != LR


def test_a_state_of_transformers_is_taken_over() -> None:
    there = made(theirs, "cosine", 3, 20, {})
    rates(there, 7)
    here = made(None, "cosine", 3, 20, {})
    here.load_state_dict(there.state_dict())
    assert here.last_epoch == 7
    assert rates(here, 5) == rates(there, 5)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("linear", {"num_cycles": 2}, "linear.*no argument 'num_cycles'.*takes none"),
        ("constant", {"power": 2}, "constant.*no argument 'power'"),
        ("cosine", {"num_cycle": 2}, "did you mean 'num_cycles'"),
        ("reduce_lr_on_plateau", {"patients": 2}, "did you mean 'patience'"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "only one"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "Unknown decay type: steep"),
    ],
)
def test_refusals(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scheduler(name, optimizer(), 0, 20, kwargs)


def test_an_unknown_argument_is_a_type_error_too() -> None:
    with pytest.raises(TypeError):
        get_scheduler("linear", optimizer(), 0, 20, {"num_cycles": 2})


def test_a_schedule_that_ends_needs_a_length() -> None:
    with pytest.raises(ValueError, match="set max_steps"):
        get_scheduler("linear", optimizer(), 0, None)
    get_scheduler("constant_with_warmup", optimizer(), 5, None)
