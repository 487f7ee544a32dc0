"""Programs, and what is given to them in the place of plans, states, batches and data: refused by name, never used."""

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import diagnostics
from forgather_fn.checkpoint import save
from tests.toys import classifier, labelled, program

BATCH = labelled(6)


def plan(**fields):
    given = {"model": classifier(), "loss": ff.losses.cross_entropy, "optimizer": ff.adamw(), "schedule": 0.1}
    return ff.Plan(**given | fields)


def trained(made, batch=BATCH):
    """Do what a user does first."""
    return made.step(made.init(0), batch)[1]["loss"]


@pytest.fixture(scope="module")
def made():
    found = program(classifier())
    found.init(0)
    return found


STATES = {
    "None": lambda: None,
    "a number": lambda: 3,
    "a mapping": dict,
    "what a step returns": lambda: (program(classifier()).init(0), {}),
}
OTHERS = {
    "another model": lambda: program(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))).init(0),
    "another optimizer": lambda: program(classifier(), optimizer=ff.sgd(momentum=0.9)).init(0),
    "an average": lambda: program(classifier(), average=ff.ema(0.9)).init(0),
    "another transform": lambda: program(classifier(), transforms=(ff.clipped(1.0),)).init(0),
}
USES = {
    "step": lambda made, state: made.step(state, BATCH),
    "steps": lambda made, state: ff.last(made.steps(state, [BATCH])),
    "evaluate": lambda made, state: made.evaluate(state, [BATCH]),
    "gradients": lambda made, state: made.gradients(state, BATCH),
    "apply": lambda made, state: made.apply(state, BATCH[0]),
    "export": lambda made, state: made.export(state),
    "save": lambda made, state: save(made, state, "run"),
    "activations": lambda made, state: diagnostics.activations(made, state, BATCH),
}
OF_ANY = {
    "convert": lambda made, state: made.convert(state, made),
    "frozen": lambda made, state: ff.frozen(made, state),
    "difference": lambda made, state: ff.difference(state, state),
    "members": lambda made, state: ff.members(state),
    "refreshed": lambda made, state: ff.refreshed_statistics(made, state, [BATCH], params="params"),
}


@pytest.mark.parametrize("use", USES | OF_ANY)
@pytest.mark.parametrize("state", STATES)
def test_what_is_no_state_is_refused(made, use, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a TrainState, got|takes a program, its state"):
        (USES | OF_ANY)[use](made, STATES[state]())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", OTHERS)
def test_a_state_of_another_program_is_refused(use, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = program(classifier(), optimizer=ff.adamw())
    made.init(0)
    with pytest.raises(ValueError, match=r"of another model or plan|was made by another plan"):
        USES[use](made, OTHERS[state]())
    assert os.listdir(tmp_path) == []


def test_a_state_of_another_optimizer_says_which_slots_differ():
    old, new = program(classifier(), optimizer=ff.adamw()), program(classifier(), optimizer=ff.sgd())
    new.init(0)
    state = old.init(0)
    with pytest.raises(
        ValueError, match=r"differ in the optimizer's slots: 'count', .* there, none here; old\.convert"
    ):
        new.step(state, BATCH)
    state, _ = new.step(old.convert(state, new, without={"optimizer"}), BATCH)
    assert state.step == 1


def test_a_state_of_other_groups_says_so():
    old, new = (program(classifier(), optimizer=ff.adamw(weight_decay=decay)) for decay in (0.1, 0.2))
    new.init(0)
    with pytest.raises(ValueError, match="they differ in the parameter groups: the learning rates, weight decays"):
        new.step(old.init(0), BATCH)


@pytest.mark.parametrize("seed", [None, "1", 1.5, True, [1], np.float64(1)], ids=repr)
def test_a_seed_that_is_none_is_refused(made, seed):
    with pytest.raises(ValueError, match="init: seed must be an integer, got"):
        made.init(seed)


@pytest.mark.parametrize("data", [None, 3, "abc", b"x", BATCH, BATCH[0], {"x": BATCH[0]}], ids=range(7))
def test_data_that_are_no_batches_are_refused(made, data):
    for look in (lambda: made.evaluate(made.init(0), data), lambda: ff.last(made.steps(made.init(0), data))):
        with pytest.raises(ValueError, match="expected a stream or an iterable of batches"):
            look()


X, Y = BATCH
BATCHES = {
    "nothing": (None, "cannot count the samples"),
    "a list of nothing": ([], "cannot count the samples"),
    "text": ("ab", "cannot count the samples"),
    "no dimension": ((torch.tensor(1.0), torch.tensor(1)), "cannot count the samples"),
    "arrays": ((X.numpy(), Y.numpy()), "make tensors of arrays"),
    "fewer labels": ((X, Y[:3]), r"do not fit a target of shape \(3,\)"),
    "a class too many": ((X, Y.new_full((6,), 9)), "Target 9 is out of bounds. The logits are of 3 classes"),
    "a class before the first": ((X, Y.new_full((6,), -1)), "Target -1 is out of bounds"),
    "probabilities of nothing": ((X, torch.rand(6)), "cannot be probabilities of classes"),
    "a number of samples below 0": (ff.Batch(BATCH, -1, None), "samples is an integer of at least 0"),
    "no number of samples": (ff.Batch(BATCH, None, None), "samples is an integer of at least 0"),
    "nan": ((X * math.nan, Y), "was not finite"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit_is_refused(made, name):
    batch, message = BATCHES[name]
    state = made.init(0)
    with pytest.raises(ValueError, match=message):
        made.step(state, batch)
    assert not state.consumed


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
@pytest.mark.parametrize(
    "loss", [ff.losses.cross_entropy, ff.losses.smoothed(ff.losses.cross_entropy, epsilon=0.1), ff.losses.focal()]
)
def test_classes_of_any_integers_are_classes(dtype, loss):
    found = [
        float(trained(ff.single(plan(model=classifier, loss=loss, init="by_name")), (X, y))) for y in (Y, Y.to(dtype))
    ]
    assert found[0] == found[1]


PLANS = {
    "no transforms": ({"transforms": None}, "takes Transforms such as"),
    "a transform's maker": ({"transforms": ff.clipped}, "takes Transforms such as"),
    "a loss's maker": ({"loss": ff.losses.focal}, "this makes one, when it is called"),
    "a loss of torch": ({"loss": nn.CrossEntropyLoss()}, "is not a function of"),
    "an optimizer's maker": ({"optimizer": ff.adamw}, "is not one of this library's"),
    "a schedule's maker": ({"schedule": ff.schedules.cosine}, "is no function of a step"),
    "a schedule of torch": ({"schedule": torch.optim.lr_scheduler.StepLR}, "is not a function of the step that gives"),
    "a schedule of nothing": ({"schedule": lambda: 0.1}, "is no function of a step"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_something_else_is_refused(name):
    fields, message = PLANS[name]
    with pytest.raises(ValueError, match=message):
        trained(ff.single(plan(**fields)))


STRATEGIES = {
    "single": ff.single,
    "accelerated": ff.accelerated,
    "pipelined": lambda given: ff.pipelined(given, {"0": "end"}),
    "memory": lambda given: ff.memory(given, BATCH),
    "joined": lambda given: ff.joined({"a": given}, lambda *given: given),
}


@pytest.mark.parametrize("given", [None, 3, "plan", {}, ff.Plan], ids=repr)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_plan_is_refused(strategy, given):
    with pytest.raises(ValueError, match=r"takes a plan, ff\.Plan|a member is a plan"):
        STRATEGIES[strategy](given)


MEMBERS = {
    "no mapping": ([plan()], "takes members by name"),
    "none": ({}, "there are no members"),
    "a number for a name": ({3: plan()}, "must be an identifier; got 3"),
    "a dot in a name": ({"a.b": plan()}, "must be an identifier; got 'a.b'"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_that_are_none_are_refused(name):
    members, message = MEMBERS[name]
    with pytest.raises(ValueError, match=message):
        ff.joined(members, lambda *given: given)


@pytest.mark.parametrize(
    "result", [None, 3, {}, (1,), (1, 2), ({}, 3)], ids=["None", "a number", "states alone", "one", "two", "numbers"]
)
def test_a_joint_step_that_gives_something_else_is_refused(result):
    made = ff.joined({"a": plan()}, lambda programs, states, batch: result)
    with pytest.raises(ValueError, match="joined: the step must give"):
        made.step(made.init(0), BATCH)
    with pytest.raises(ValueError, match="takes members by name, and a function"):
        ff.joined({"a": plan()}, result)


SPLITS = {
    "nothing": (None, "expected a mapping"),
    "a number": (3, "expected a mapping"),
    "no cuts": ({}, "expected a mapping"),
    "a list": ([("0", "end")], "expected a mapping"),
    "an unknown module": ({"9": "end"}, "has no module '9'; it has "),
    "a module near another": ({"0.": "end"}, "has no module '0.'; it has '0'"),
    "a number for a name": ({0: "end"}, "has no module 0"),
    "another side": ({"0": "middle"}, "not at 'middle'"),
    "no side": ({"0": None}, "not at None"),
    "a list for a side": ({"0": ["end"]}, "not at "),
    "nothing behind": ({"2": "end"}, "no module is left for the last stage"),
    "nothing before": ({"0": "beginning"}, "no module is left for the first stage"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_that_is_none_is_refused(name):
    split, message = SPLITS[name]
    with pytest.raises(ValueError, match=message):
        ff.pipelined(plan(), split)


OPTIONS = [("schedule", v) for v in (None, "x", 3)] + [
    (name, value) for name in ("stages_per_rank", "pipelines") for value in (0, -1, 1.5, "2", True)
]


@pytest.mark.parametrize(("name", "value"), [*OPTIONS, ("pipelines", 2), ("pipelines", None)])
def test_an_option_of_a_pipeline_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=name if value != 2 else "spread evenly"):
        ff.pipelined(plan(), {"0": "end"}, **{name: value})


OUTPUTS = {
    "nothing": lambda y: None,
    "a number": lambda y: 3,
    "other names": lambda y: {"a": y},
    "an empty tuple": lambda y: (),
    "no dimension": lambda y: y.sum(),
    "an array": lambda y: y.detach().numpy(),
    "half of the rows": lambda y: y[:3],
    "one class": lambda y: y[:, :1],
    "integers": lambda y: y.long(),
    "complex numbers": lambda y: y + 0j,
    "no gradient": lambda y: y.detach(),
    "an infinity": lambda y: y * math.inf,
}


class Odd(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.change = change

    def forward(self, x):
        return self.change(self.layer(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_model_that_gives_something_else_is_refused(name):
    model = nn.Sequential(nn.Linear(5, 5), Odd(OUTPUTS[name]))
    for found in (ff.single(plan(model=model)), ff.pipelined(plan(model=model), {"0": "end"})):
        state = found.init(0)
        with pytest.raises(ValueError):
            found.step(state, BATCH)
        assert not state.consumed
