"""Hyperparameters that change from step to step, against torch's optimizers with their options set by hand."""

import pytest
import torch

import forgather_fn as ff
from tests.toys import (
    VIEWED,
    assert_equal,
    assert_same_tensors,
    classifier,
    decaying,
    labelled,
    labelled_batches,
    mean_cross_entropy,
    program,
    trained,
)

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
RATE = ff.schedules.cosine(peak=3e-2, warmup=4, total=25)
DECAY = ff.schedules.linear(peak=0.3, total=10, final=0.1)
BETA = ff.schedules.piecewise(boundaries=(3, 6), values=(0.5, 0.9, 0.7))
FACTOR = ff.schedules.piecewise(boundaries=(4,), values=(0.0, 2.0))


def by_hand(model, batches, optimizer, set_options):
    for step, batch in enumerate(batches):
        for row in optimizer.param_groups:
            set_options(row, step)
        optimizer.zero_grad(set_to_none=True)
        mean_cross_entropy(model, batch).backward()
        optimizer.step()
    return model


@STORAGES
@pytest.mark.parametrize("adam", [True, False])
def test_decay_and_betas_of_adam(viewed_elements, adam):
    make, kind = (ff.adam, torch.optim.Adam) if adam else (ff.adamw, torch.optim.AdamW)
    batches = labelled_batches(10, dtype=torch.float64)
    model = classifier(torch.float64)

    def options(row, step):
        row.update(lr=RATE(step), weight_decay=DECAY(step) if row["weight_decay"] else 0.0, betas=(BETA(step), 0.95))

    by_hand(model, batches, kind(decaying(model, 1.0), fused=True), options)
    optimizer = make(weight_decay=DECAY, betas=(BETA, 0.95))
    state = trained(
        classifier(torch.float64), batches, optimizer=optimizer, schedule=RATE, viewed_elements=viewed_elements
    )
    assert_same_tensors(state, model, atol=1e-13)


@STORAGES
@pytest.mark.parametrize("nesterov", [True, False])
def test_decay_and_momentum_of_sgd(viewed_elements, nesterov):
    batches = labelled_batches(10, dtype=torch.float64)
    model = classifier(torch.float64)

    def options(row, step):
        row.update(lr=RATE(step), weight_decay=DECAY(step) if row["weight_decay"] else 0.0, momentum=BETA(step))

    theirs = torch.optim.SGD(decaying(model, 1.0), momentum=0.5, nesterov=nesterov, fused=True)
    by_hand(model, batches, theirs, options)
    optimizer = ff.sgd(weight_decay=DECAY, momentum=BETA, nesterov=nesterov)
    state = trained(
        classifier(torch.float64), batches, optimizer=optimizer, schedule=RATE, viewed_elements=viewed_elements
    )
    assert_same_tensors(state, model, atol=1e-13)


def grouped(make, **options):
    return make(groups=[ff.group("0.*", learning_rate=FACTOR, weight_decay=DECAY, name="first")], **options)


MAKERS = {
    "adamw": lambda: grouped(ff.adamw, weight_decay=0.1),
    "from_torch": lambda: grouped(lambda **more: ff.from_torch(torch.optim.AdamW, **more), weight_decay=0.1),
}


@STORAGES
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_rates_and_decays_of_groups(make, viewed_elements):
    batches = labelled_batches(10, dtype=torch.float64)
    model = classifier(torch.float64)
    rows = [
        {"params": [*model[0].parameters()], "first": True},
        {"params": [model[2].weight], "weight_decay": 0.1},
        {"params": [model[2].bias], "weight_decay": 0.0},
    ]

    def options(row, step):
        row["lr"] = RATE(step) * (FACTOR(step) if "first" in row else 1.0)
        if "first" in row:
            row["weight_decay"] = DECAY(step)

    by_hand(model, batches, torch.optim.AdamW(rows), options)
    state = trained(
        classifier(torch.float64), batches, optimizer=make(), schedule=RATE, viewed_elements=viewed_elements
    )
    assert_same_tensors(state, model, atol=1e-13)


def test_values_are_reported_and_those_of_a_group_as_rates():
    made = program(classifier(), optimizer=grouped(ff.adamw, betas=(BETA, 0.9)), schedule=RATE)
    state, metrics = made.step(made.init(0), labelled(6))
    for _ in range(4):
        state, metrics = made.step(state, labelled(6))
    found = {name: metrics[name] for name in ("learning_rate", "learning_rate/first", "weight_decay/first", "beta1")}
    assert found == {
        "learning_rate": RATE(4),
        "learning_rate/first": 2.0 * RATE(4),
        "weight_decay/first": DECAY(4),
        "beta1": 0.9,
    }


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_group_is_unfrozen_at_its_step(weight_decay):
    made = program(classifier(), optimizer=grouped(ff.adamw, weight_decay=weight_decay))
    state = made.init(0)
    first = {name: tensor.clone() for name, tensor in state.params.items()}
    for step in range(6):
        state, _ = made.step(state, labelled(6, seed=step))
        for name, tensor in first.items():
            frozen = name.startswith("0.") and step < 4
            assert torch.equal(state.params[name], tensor) is frozen, (step, name)


@pytest.mark.parametrize("optimizer", [grouped(ff.adamw, betas=(BETA, 0.9)), ff.sgd(momentum=BETA, weight_decay=DECAY)])
def test_updates_in_the_backward_pass_read_them(optimizer):
    batches = labelled_batches(6)
    changes = {"optimizer": optimizer, "schedule": RATE, "viewed_elements": 0}
    one = trained(classifier(), batches, update="in_backward", **changes)
    assert_equal(one, trained(classifier(), batches, **changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.adamw(betas=(lambda step: 1.0, 0.9)), r"beta1.*gave 1.0 at step 0.*\[0, 1\)"),
        (lambda: ff.adamw(betas=(0.9, lambda step: 1.5)), r"beta2.*gave 1.5 at step 0"),
        (lambda: ff.adamw(weight_decay=lambda step: -1.0), "gave -1.0 at step 0"),
        (lambda: ff.sgd(momentum=lambda step: float("nan")), "gave nan at step 0"),
        (lambda: ff.adamw(groups=[ff.group("0.*", learning_rate=lambda step: float("inf"))]), "gave inf at step 0"),
    ],
)
def test_values_outside_their_range_are_refused_and_leave_the_state(make, message):
    made = program(classifier(), optimizer=make())
    state = made.init(0)
    with pytest.raises(ValueError, match=message):
        made.step(state, labelled(6))
    assert not state.consumed


def test_two_groups_of_one_name_are_refused():
    one = ff.group(lambda name, tensor: "0" in name, learning_rate=FACTOR, name="x")
    with pytest.raises(ValueError, match="two groups have schedules for 'learning_rate/x'"):
        ff.adamw(groups=[one, ff.group("2.*", learning_rate=DECAY, name="x")])
