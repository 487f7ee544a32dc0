import pytest
import torch

import forgather_fn as ff
from forgather_fn import tree
from tests.toys import (
    VIEWED,
    Branches,
    assert_equal,
    assert_same_tensors,
    branching,
    by_hand,
    classifier,
    decaying,
    labelled,
    labelled_batches,
    program,
    trained,
    unchanged,
)

FACTORIES = {
    "rmsprop": lambda rows: torch.optim.RMSprop(rows, alpha=0.9, momentum=0.5, centered=True),
    "adagrad": lambda rows: torch.optim.Adagrad(rows, initial_accumulator_value=0.1, lr_decay=0.01),
    "nadam": lambda rows: torch.optim.NAdam(rows),
    "adamax": lambda rows: torch.optim.Adamax(rows),
    "adafactor": lambda rows: torch.optim.Adafactor(rows),
    "asgd": lambda rows: torch.optim.ASGD(rows),
    "rprop": lambda rows: torch.optim.Rprop(rows),
    "amsgrad": lambda rows: torch.optim.AdamW(rows, amsgrad=True),
    "sgd": lambda rows: torch.optim.SGD(rows),
    "fused": lambda rows: torch.optim.AdamW(rows, fused=True),
}
KINDS = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
RATE = ff.schedules.linear(peak=2e-2, warmup=3, total=20)


@KINDS
@STORAGES
def test_twenty_steps_are_those_of_the_optimizer_itself(factory, viewed_elements):
    model = classifier()
    by_hand(model, labelled_batches(15), factory([{"params": list(model.parameters())}]), learning_rate=RATE)
    changes = {"optimizer": ff.from_torch(factory), "schedule": RATE, "viewed_elements": viewed_elements}
    assert_same_tensors(trained(classifier(), labelled_batches(15), **changes), model)


@KINDS
def test_the_state_is_data_and_a_copy_goes_on_to_the_bit(factory):
    made = program(classifier(), optimizer=ff.from_torch(factory))
    state = ff.fold(made.step, made.init(0), labelled_batches(3))
    copies = [state.copy(), state.copy()]
    for slot, values in state.opt.items():
        assert isinstance(slot, str)
        assert set(values) <= set(state.params)
    state = ff.fold(made.step, state, labelled_batches(5))
    assert_equal(ff.fold(made.step, copies[0], labelled_batches(5)), state)
    # In another program, as after a restart.
    other = program(classifier(), optimizer=ff.from_torch(factory))
    other.init(0)
    assert_equal(ff.fold(other.step, copies[1], labelled_batches(5)), state)


@KINDS
def test_donating_and_copying_give_the_same_bits(factory):
    donated = trained(classifier(), labelled_batches(5), optimizer=ff.from_torch(factory))
    assert_equal(donated, trained(classifier(), labelled_batches(5), optimizer=ff.from_torch(factory), donate=False))


@KINDS
def test_two_states_in_turn_equal_two_runs(factory):
    made = program(classifier(), optimizer=ff.from_torch(factory))
    states = [made.init(0), made.init(1)]
    alone = [state.copy() for state in states]
    for batch in labelled_batches(4):
        states = [made.step(state, batch)[0] for state in states]
    for state, begun in zip(states, alone, strict=True):
        assert_equal(state, ff.fold(made.step, begun, labelled_batches(4)))


@STORAGES
@pytest.mark.parametrize("name", ["rmsprop", "nadam", "amsgrad"])
def test_gradients_that_come_and_go(name, viewed_elements):
    batches = [branching(i % 2 == 0, i % 3 == 0, seed=i) for i in range(8)]
    model = Branches()
    by_hand(model, batches, FACTORIES[name](list(model.parameters())))
    by_hand_rate = {"optimizer": ff.from_torch(FACTORIES[name]), "schedule": default_rate(name)}
    assert_same_tensors(trained(Branches(), batches, viewed_elements=viewed_elements, **by_hand_rate), model)


def default_rate(name):
    return FACTORIES[name]([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]


def test_weight_decay_by_group():
    model = classifier()
    by_hand(model, labelled_batches(5), torch.optim.AdamW(decaying(model, 0.3), lr=1e-2))
    optimizer = ff.from_torch(lambda rows: torch.optim.AdamW(rows), weight_decay=0.3)
    assert_same_tensors(trained(classifier(), labelled_batches(5), optimizer=optimizer), model)


def test_without_a_weight_decay_that_of_the_factory_counts_for_all():
    model = classifier()
    by_hand(model, labelled_batches(5), torch.optim.AdamW(model.parameters(), weight_decay=0.4, lr=1e-2))
    optimizer = ff.from_torch(lambda rows: torch.optim.AdamW(rows, weight_decay=0.4))
    assert_same_tensors(trained(classifier(), labelled_batches(5), optimizer=optimizer), model)


def test_a_group_with_a_decay_of_its_own_leaves_that_of_the_factory_to_the_others():
    model = classifier()
    rows = [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[2].parameters()}]
    by_hand(model, labelled_batches(5), torch.optim.AdamW(rows, weight_decay=0.4, lr=1e-2))
    optimizer = ff.from_torch(
        lambda rows: torch.optim.AdamW(rows, weight_decay=0.4), groups=[ff.group("0.*", weight_decay=0.0)]
    )
    assert_same_tensors(trained(classifier(), labelled_batches(5), optimizer=optimizer), model)


def test_groups_scale_the_learning_rate_and_freeze():
    model = classifier()
    rows = [{"params": [model[2].weight, model[2].bias], "factor": 3.0}]
    model[0].requires_grad_(False)
    by_hand(model, labelled_batches(5), torch.optim.RMSprop(rows), learning_rate=RATE)
    groups = [ff.group("0.*", frozen=True), ff.group("2.*", learning_rate=3.0)]
    optimizer = ff.from_torch(lambda rows: torch.optim.RMSprop(rows), groups=groups)
    assert_same_tensors(trained(classifier(), labelled_batches(5), optimizer=optimizer, schedule=RATE), model)


def test_clipping_comes_before_the_optimizer():
    model = classifier()
    by_hand(model, labelled_batches(5), torch.optim.RMSprop(model.parameters(), lr=1e-2), max_norm=0.05)
    optimizer = ff.from_torch(lambda rows: torch.optim.RMSprop(rows))
    state = trained(
        classifier(), labelled_batches(5), optimizer=optimizer, transforms=[ff.clipped(0.05)], viewed_elements=0
    )
    assert_same_tensors(state, model, atol=1e-6)


class Counting(torch.optim.Optimizer):
    """Keeps a number in its parameter groups, as schedule-free optimizers do."""

    def __init__(self, rows):
        super().__init__(rows, {"lr": 1e-2, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for options in self.param_groups:
            options["k"] += 1
            for parameter in options["params"]:
                parameter.sub_(options["lr"] / options["k"] * parameter.grad)


def test_numbers_that_an_optimizer_keeps_in_its_groups_are_data_too():
    model = classifier()
    by_hand(model, labelled_batches(4), Counting(model.parameters()))
    donated = trained(classifier(), labelled_batches(4), optimizer=ff.from_torch(Counting))
    assert_same_tensors(donated, model)
    assert_equal(donated, trained(classifier(), labelled_batches(4), optimizer=ff.from_torch(Counting), donate=False))


class NeedsClosure(torch.optim.Optimizer):
    def __init__(self, rows):
        super().__init__(rows, {"lr": 1e-2})

    def step(self, closure):
        closure()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda rows: torch.optim.LBFGS(rows[0]["params"]), "LBFGS evaluates the loss several times"),
        (lambda rows: "sgd", "returned str, not an optimizer"),
        (NeedsClosure, "closure"),
        (
            lambda rows: torch.optim.SGD(classifier().parameters(), lr=0.1),
            r"SGD over other parameters than those that it was given: it lacks '0\.weight', .* and has 4 others",
        ),
        (lambda rows: torch.optim.SGD(rows[0]["params"][1:], lr=0.1), r"lacks '0\.weight', and has 0 others"),
        (
            lambda rows: torch.optim.SGD([{"params": [one]} for one in rows[0]["params"]], lr=0.1),
            r"SGD with 4 groups, of \[1, 1, 1, 1\] parameters, and was given 1, of \[4\]",
        ),
    ],
    ids=["lbfgs", "none", "closure", "other parameters", "fewer parameters", "other groups"],
)
def test_what_cannot_be_a_pure_update_is_refused_and_consumes_nothing(factory, message):
    states = []

    def run():
        made = program(classifier(), optimizer=ff.from_torch(factory))
        states.append(made.init(0))
        made.step(states[0], labelled(6))

    with pytest.raises(ValueError, match=message):
        run()
    assert not any(state.consumed for state in states)


def test_a_skipped_step_does_not_run_the_optimizer():
    made = program(classifier(), optimizer=ff.from_torch(FACTORIES["nadam"]), on_nonfinite="skip")
    state, _ = made.step(made.init(0), labelled(6))
    before = state.copy()
    features, labels = labelled(6)
    state, _ = made.step(state, (features * float("inf"), labels))
    assert tree.difference(state.opt, before.opt) is None
    assert tree.difference(state.params, before.params) is None


def test_reading_the_state_of_a_run_does_not_change_it():
    made = program(classifier(), optimizer=ff.from_torch(FACTORIES["rmsprop"]))
    state, _ = made.step(made.init(0), labelled(6))
    with unchanged(state):
        made.gradients(state, labelled(6))
        made.evaluate(state, [labelled(6)])
