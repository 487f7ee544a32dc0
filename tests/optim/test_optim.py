import itertools
from types import MappingProxyType

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.flat import Hyper
from forgather_fn.groups import matrices
from forgather_fn.optim import slots_like
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
)

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])

# Ours, and torch's with the same numbers.
PAIRS = {
    "adamw": (ff.adamw(weight_decay=0.1), lambda rows: torch.optim.AdamW(rows, fused=True), 0.1),
    "adamw_options": (
        ff.adamw(weight_decay=0.2, betas=(0.8, 0.95), eps=1e-5),
        lambda rows: torch.optim.AdamW(rows, betas=(0.8, 0.95), eps=1e-5, fused=True),
        0.2,
    ),
    "adam": (ff.adam(), lambda rows: torch.optim.Adam(rows, fused=True), 0.0),
    "adam_decay": (ff.adam(weight_decay=0.1), lambda rows: torch.optim.Adam(rows, fused=True), 0.1),
    "sgd": (ff.sgd(), lambda rows: torch.optim.SGD(rows, fused=True), 0.0),
    "sgd_decay": (ff.sgd(weight_decay=0.1), lambda rows: torch.optim.SGD(rows, fused=True), 0.1),
    "momentum": (
        ff.sgd(momentum=0.9, weight_decay=0.1),
        lambda rows: torch.optim.SGD(rows, momentum=0.9, fused=True),
        0.1,
    ),
    "nesterov": (
        ff.sgd(momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda rows: torch.optim.SGD(rows, momentum=0.8, nesterov=True, fused=True),
        0.1,
    ),
}
OPTIMIZERS = pytest.mark.parametrize(("ours", "theirs", "weight_decay"), PAIRS.values(), ids=PAIRS.keys())
RATE = ff.schedules.cosine(peak=3e-2, warmup=4, total=25)


def unfused(optimizer):
    for options in optimizer.param_groups:
        options.update(fused=False, foreach=True)


@STORAGES
@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_twenty_steps_are_those_of_torch(ours, theirs, weight_decay, viewed_elements, dtype):
    batches = labelled_batches(20, dtype=dtype)
    model = classifier(dtype)
    optimizer = theirs(decaying(model, weight_decay))
    if dtype == torch.bfloat16 and isinstance(optimizer, torch.optim.SGD):
        unfused(optimizer)  # torch 2.13's fused one is wrong by the size of an update
    by_hand(model, batches, optimizer, learning_rate=RATE)
    state = trained(classifier(dtype), batches, optimizer=ours, schedule=RATE, viewed_elements=viewed_elements)
    rounding = {torch.float32: 3e-7, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert_same_tensors(state, model, atol=0.0 if viewed_elements == 0 else rounding)


@STORAGES
@OPTIMIZERS
@pytest.mark.parametrize("max_norm", [0.05, 1e-4])
def test_clipping_is_exact_in_float64(ours, theirs, weight_decay, viewed_elements, max_norm):
    batches = labelled_batches(10, dtype=torch.float64)
    model = classifier(torch.float64)
    by_hand(model, batches, theirs(decaying(model, weight_decay)), learning_rate=RATE, max_norm=max_norm)
    changes = {"optimizer": ours, "schedule": RATE, "transforms": [ff.clipped(max_norm)]}
    state = trained(classifier(torch.float64), batches, viewed_elements=viewed_elements, **changes)
    assert_same_tensors(state, model, atol=1e-13)


WHICH = [*itertools.product([True, False], repeat=2)] * 3


@STORAGES
@OPTIMIZERS
@pytest.mark.parametrize("which", [WHICH, [(True, False)] * 4 + [(True, True)] * 4, [(False, False)] * 3 + WHICH])
def test_gradients_that_come_and_go(ours, theirs, weight_decay, viewed_elements, which):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate(which)]
    model = Branches().double()
    optimizer = theirs(decaying(model, weight_decay))
    if isinstance(optimizer, torch.optim.SGD):
        unfused(optimizer)  # the fused one fails where some parameters have momentum and others have none yet
    by_hand(model, batches, optimizer, learning_rate=RATE)
    changes = {"optimizer": ours, "schedule": RATE, "viewed_elements": viewed_elements}
    state = trained(Branches().double(), batches, **changes)
    assert_same_tensors(state, model, atol=1e-12)
    assert_equal(state, trained(Branches().double(), batches, donate=False, **changes))


@STORAGES
def test_the_counts_are_those_of_torch(viewed_elements):
    batches = [branching(*on, seed=i) for i, on in enumerate(WHICH)]
    model = Branches()
    optimizer = torch.optim.AdamW(model.parameters())
    by_hand(model, batches, optimizer)
    state = trained(Branches(), batches, viewed_elements=viewed_elements)
    expected = [optimizer.state[parameter]["step"].item() for parameter in model.parameters()]
    assert state.opt["count"].tolist() == expected
    assert len(set(expected)) > 1


@STORAGES
@OPTIMIZERS
def test_a_parameter_that_never_gets_a_gradient_is_untouched(ours, theirs, weight_decay, viewed_elements):
    del theirs, weight_decay
    batches = [branching(True, False, seed=i) for i in range(4)]
    state = trained(Branches(), batches, optimizer=ours, viewed_elements=viewed_elements)
    assert torch.equal(state.params["right.weight"], Branches().right.weight)
    assert not torch.equal(state.params["left.weight"], Branches().left.weight)
    for name, slot in state.opt.items():
        if name != "count":
            assert not slot["right.weight"].any()
            assert slot["left.weight"].any()


@STORAGES
def test_padding_stays_zero(viewed_elements):
    state = trained(
        classifier(),
        labelled_batches(3),
        average=ff.ema(0.9),
        transforms=[ff.noise(0.1)],
        viewed_elements=viewed_elements,
    )
    for flat in (state.params, state.ema, state.opt["exp_avg"], state.opt["exp_avg_sq"]):
        inside = sum(int(tensor.count_nonzero()) for tensor in flat.values())
        assert sum(int(buffer.count_nonzero()) for buffer in flat.buffers) == inside


class TestGroups:
    @STORAGES
    def test_rates_and_decays_of_their_own(self, viewed_elements):
        batches = labelled_batches(8, dtype=torch.float64)
        model = classifier(torch.float64)
        rows = [
            {"params": [model[0].weight], "weight_decay": 0.3, "factor": 0.1},
            {"params": [model[0].bias], "weight_decay": 0.3, "factor": 0.1},
            {"params": [model[2].weight], "weight_decay": 0.1, "factor": 2.0},
            {"params": [model[2].bias], "weight_decay": 0.0, "factor": 1.0},
        ]
        by_hand(model, batches, torch.optim.AdamW(rows, fused=True), learning_rate=RATE)
        optimizer = ff.adamw(
            weight_decay=0.1,
            groups=[
                ff.group("0.*", learning_rate=0.1, weight_decay=0.3),
                ff.group(lambda name, tensor: tensor.dim() == 2, learning_rate=2.0),
            ],
        )
        state = trained(
            classifier(torch.float64), batches, optimizer=optimizer, schedule=RATE, viewed_elements=viewed_elements
        )
        assert_same_tensors(state, model, atol=1e-12)

    def test_the_first_group_that_matches_counts(self):
        groups = [
            ff.group("0.bias", learning_rate=2.0),
            ff.group("0.*", learning_rate=3.0),
            ff.group("*", learning_rate=4.0),
        ]
        hypers = ff.adamw(groups=groups).groups(dict(classifier().named_parameters()))
        assert [hypers[name].learning_rate for name in ("0.weight", "0.bias", "2.weight", "2.bias")] == [
            3.0,
            2.0,
            4.0,
            4.0,
        ]

    def test_matrices_decay_and_others_do_not(self):
        hypers = ff.adamw(weight_decay=0.3).groups({"w": torch.zeros(2, 2), "b": torch.zeros(2), "s": torch.zeros(())})
        assert hypers == {"w": Hyper(weight_decay=0.3), "b": Hyper(), "s": Hyper()}
        assert matrices("x", torch.zeros(1, 1, 1))

    def test_what_decays_can_be_chosen(self):
        named = dict(classifier().named_parameters())
        hypers = ff.adamw(weight_decay=0.3, decays=lambda name, tensor: name.startswith("2")).groups(named)
        assert [hypers[name].weight_decay for name in named] == [0.0, 0.0, 0.3, 0.3]

    @STORAGES
    def test_a_frozen_group_is_not_trained(self, viewed_elements):
        optimizer = ff.adamw(weight_decay=0.1, groups=[ff.group("0.*", frozen=True)])
        state = trained(classifier(), labelled_batches(4), optimizer=optimizer, viewed_elements=viewed_elements)
        assert list(state.frozen) == ["0.weight", "0.bias"]
        assert list(state.params) == list(state.opt["exp_avg"]) == ["2.weight", "2.bias"]
        assert torch.equal(state.frozen["0.weight"], classifier()[0].weight)
        model = classifier()
        model[0].requires_grad_(False)
        other = trained(model, labelled_batches(4), viewed_elements=viewed_elements)
        assert_equal(state, other)

    def test_a_group_that_matches_nothing_is_refused(self):
        for groups in ([ff.group("1.*")], [ff.group("*"), ff.group(lambda name, tensor: False)]):
            with pytest.raises(
                ValueError, match=r"group .* matches no parameter; the parameters are '0.bias', '0.weight'"
            ):
                program(classifier(), optimizer=ff.adamw(groups=groups)).init(0)

    def test_a_group_that_matches_only_what_the_user_froze_is_refused(self):
        model = classifier()
        model[0].requires_grad_(False)
        with pytest.raises(ValueError, match=r"group '0\.\*' matches no parameter"):
            program(model, optimizer=ff.adamw(groups=[ff.group("0.*", learning_rate=2.0)])).init(0)

    def test_a_group_behind_another_that_takes_all_of_it_is_no_error(self):
        ff.adamw(groups=[ff.group("*"), ff.group("0.*")]).groups(dict(classifier().named_parameters()))

    def test_nothing_left_to_train_is_refused(self):
        with pytest.raises(ValueError, match="every parameter is in a frozen group"):
            program(classifier(), optimizer=ff.adamw(groups=[ff.group("*", frozen=True)])).init(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.adamw(betas=(0.9, 1.0)), r"adamw: betas must be two numbers in \[0, 1\).*betas=\(0.9, 1.0\)"),
        (lambda: ff.adam(betas=(-0.1, 0.9)), "adam: betas"),
        (lambda: ff.adamw(betas=(0.9,)), "adamw: betas must be two"),
        (lambda: ff.adamw(eps=-1e-8), "eps"),
        (lambda: ff.adamw(weight_decay=-0.1), "weight_decay"),
        (lambda: ff.adamw(weight_decay=float("nan")), "weight_decay"),
        (lambda: ff.sgd(momentum=-0.1), "sgd: momentum must be at least 0"),
        (lambda: ff.sgd(nesterov=True), "above 0 for nesterov"),
        (lambda: ff.sgd(weight_decay=-1.0), "weight_decay"),
        (lambda: ff.group("*", learning_rate=-1.0), "learning_rate"),
        (lambda: ff.group("*", weight_decay=-1.0), "weight_decay"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_of_ones_own():
    # Signed descent, on whole pieces; and an optimizer that needs shapes, on named views.
    def update(gradients, state, params, context):
        for name, gradient in gradients.items():
            params[name].sub_(context.learning_rate * gradient.sign() * (1 - context.found_inf))
            state["seen"][name].add_(1 - context.found_inf)
        return state

    optimizer = ff.Optimizer(
        lambda params: {"seen": slots_like(params)}, update, lambda params: {name: Hyper() for name in params}
    )
    made = program(classifier(), optimizer=optimizer, schedule=0.5, transforms=[ff.clipped(0.1)])
    state = made.init(0)
    gradients, _, _ = made.gradients(state, labelled(6))
    kept = state.copy()
    state, _ = made.step(state, labelled(6))
    for name, gradient in gradients.items():
        assert torch.equal(state.params[name], kept.params[name] - 0.5 * gradient.sign())
        assert state.opt["seen"][name].eq(1).all()


def test_an_optimizer_of_ones_own_without_groups_decays_nothing_and_freezes_nothing():
    def update(gradients, state, params, context):
        for name, gradient in gradients.items():
            state["sum"][name].addcmul_(gradient, gradient, value=1 - context.found_inf.item())
            params[name].addcdiv_(gradient, state["sum"][name].sqrt() + 1e-10, value=-context.learning_rate)
        return state

    own = ff.Optimizer(lambda params: {"sum": slots_like(params)}, update)
    assert set(own.groups(dict(classifier().named_parameters())).values()) == {Hyper()}
    batches = labelled_batches(5)
    state = trained(classifier(), batches, optimizer=own, schedule=0.1)
    model = classifier()
    by_hand(model, batches, torch.optim.Adagrad(model.parameters(), lr=0.1))
    assert_same_tensors(state, model, rtol=1e-5, atol=1e-7)


def test_slots_have_the_layout_of_the_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    state = program(model).init(0)
    slots = slots_like(state.params)
    assert slots.layout is state.params.layout
    assert [buffer.dtype for buffer in slots.buffers] == [torch.float32, torch.float64]
    assert not any(buffer.any() for buffer in slots.buffers)
    assert isinstance(MappingProxyType(slots)["0.weight"], torch.Tensor)
