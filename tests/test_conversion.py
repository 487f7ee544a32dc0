"""A state is carried into another program: what both have goes on, what is new is as the other begins."""

from typing import Any

import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.conversion import Conversion
from tests import zoo
from tests.toys import Branches, Noisy, assert_equal, branching, classifier, labelled_batches, program


def run(made: ff.Program, state: ff.TrainState, batches: list[Any]) -> ff.TrainState:
    return ff.fold(made.step, state, batches)


def trained_by(made: ff.Program, steps: int = 3) -> ff.TrainState:
    return run(made, made.init(0), labelled_batches(steps))


GROUPED = ff.adamw(weight_decay=0.1, groups=[ff.group("2.*", learning_rate=0.1)])
FROZEN = ff.adamw(weight_decay=0.1, groups=[ff.group("0.*", frozen=True)])


@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
def test_a_state_converted_into_its_own_plan_is_a_copy(name):
    plan = zoo.plan_of(name, average=ff.ema(0.5), transforms=(ff.clipped(1.0),))
    made = ff.single(plan)
    state, _ = made.step(made.init(3), zoo.SPECIMENS[name].batch(4))
    accounts: list[Conversion] = []
    again = made.convert(state, ff.single(plan), tell=accounts.append)
    assert_equal(again, state)
    assert (accounts[0].fresh, accounts[0].dropped) == ((), ())


@pytest.mark.parametrize("optimizer", sorted(zoo.OPTIMIZERS))
def test_a_run_goes_on_through_a_conversion_as_if_there_was_none(optimizer):
    batches = labelled_batches(6)
    plain = {"optimizer": zoo.OPTIMIZERS[optimizer](), "average": ff.ema(0.9)}
    first, second = program(Noisy, **plain), program(Noisy, **plain)
    middle = run(first, first.init(0), batches[:3])
    going_on = run(second, first.convert(middle, second), batches[3:])
    assert_equal(going_on, run(first, middle, batches[3:]))


def test_the_state_that_is_converted_stays_as_it_was():
    one, other = program(classifier(), optimizer=FROZEN), program(classifier(seed=1), optimizer=GROUPED)
    state = trained_by(one)
    before = state.copy()
    run(other, one.convert(state, other), labelled_batches(2))
    assert_equal(state, before)


def test_one_module_may_serve_both_programs():
    model = classifier()
    one, other = program(model), program(model, optimizer=GROUPED)
    state = trained_by(one)
    kept = state.copy()
    moved = run(other, one.convert(state, other), labelled_batches(1))
    assert_equal(state, kept)
    expected = program(classifier(), optimizer=GROUPED)
    assert_equal(moved, run(expected, one.convert(kept, expected), labelled_batches(1)))


def test_other_groups_carry_every_slot_and_count():
    one, other = program(classifier), program(classifier, optimizer=GROUPED)
    state = trained_by(one)
    made = one.convert(state, other)
    for slot in ("exp_avg", "exp_avg_sq"):
        for name, held in state.opt[slot].items():
            assert torch.equal(made.opt[slot][name], held)
    assert made.opt["count"].tolist() == [3.0] * 4


def test_counts_go_with_their_parameters():
    one = program(Branches)
    state = run(one, one.init(0), [branching(True, False), branching(True, True)])
    counts = dict(zip(state.params, state.opt["count"].tolist(), strict=True))
    assert counts["left.weight"] == 2.0
    assert counts["right.weight"] == 1.0
    other = program(Branches, optimizer=ff.adamw(groups=[ff.group("left.*", frozen=True)]))
    made = one.convert(state, other)
    assert dict(zip(made.params, made.opt["count"].tolist(), strict=True)) == {
        name: count for name, count in counts.items() if not name.startswith("left")
    }


def test_unfreezing_keeps_the_slots_of_what_was_trained():
    batches = labelled_batches(6)
    one, other = program(classifier, optimizer=FROZEN), program(classifier)
    state = run(one, one.init(0), batches[:3])
    accounts: list[Conversion] = []
    made = one.convert(state, other, tell=accounts.append)
    assert torch.equal(made.opt["exp_avg"]["2.weight"], state.opt["exp_avg"]["2.weight"])
    assert not made.opt["exp_avg"]["0.weight"].any()
    assert made.opt["count"].tolist() == [0.0, 0.0, 3.0, 3.0]
    assert accounts[0].fresh == tuple(f"opt/{slot}/0.{kind}" for slot in ("exp_avg", "exp_avg_sq") for kind in KINDS)
    assert run(other, made, batches[3:]).step == 6


KINDS = ("weight", "bias")


def test_freezing_lets_go_of_slots_and_keeps_values():
    one, other = program(classifier), program(classifier, optimizer=FROZEN)
    state = trained_by(one)
    accounts: list[Conversion] = []
    made = one.convert(state, other, tell=accounts.append)
    assert list(made.frozen) == ["0.weight", "0.bias"]
    assert torch.equal(made.frozen["0.weight"], state.params["0.weight"])
    assert "opt/exp_avg/0.weight" in accounts[0].dropped
    later = run(one, state, labelled_batches(1))
    assert not torch.equal(later.params["0.weight"], made.frozen["0.weight"])  # the other's own memory


def test_frozen_parameters_are_shared_and_never_written_to():
    one, other = program(classifier, optimizer=FROZEN), program(lambda: classifier(seed=1), optimizer=FROZEN)
    mine = other.init(0)
    before = mine.copy()
    state = trained_by(one)
    made = one.convert(state, other)
    assert made.frozen["0.weight"].data_ptr() == state.frozen["0.weight"].data_ptr()
    for name, held in mine.frozen.items():
        assert torch.equal(held, before.frozen[name])


class Longer(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*classifier(), nn.Linear(3, 3))


def test_new_parameters_are_as_the_other_program_begins():
    one, other = program(classifier), program(Longer)
    state = trained_by(one)
    made = one.convert(state, other)
    assert torch.equal(made.params["3.weight"], other.init(0).params["3.weight"])
    assert torch.equal(made.params["0.weight"], state.params["0.weight"])
    back = other.convert(made, one, dropping=["3.*"])
    assert_equal(back, state)


def test_other_precisions():
    one, other = program(classifier), program(classifier, precision="float64", microbatches=2)
    made = one.convert(trained_by(one), other)
    assert made.params["0.weight"].dtype == made.opt["exp_avg"]["0.weight"].dtype == torch.float64
    assert_equal(other.convert(made, one), trained_by(one))
    scaled = program(classifier, precision="float16")
    assert float(one.convert(trained_by(one), scaled).loss_scale["scale"]) == 65536.0


def test_another_kind_of_optimizer_or_transform_begins_fresh():
    torch_one = zoo.OPTIMIZERS["rmsprop"]()
    one = program(classifier, optimizer=torch_one)
    state = trained_by(one)
    assert "square_avg" in state.opt
    other = program(classifier, optimizer=ff.from_torch(torch.optim.AdamW))
    made = one.convert(state, other)
    assert made.opt == {}
    assert run(other, made, labelled_batches(1)).step == 4


def test_an_average_is_carried_or_begins_as_the_parameters():
    one, other = program(classifier), program(classifier, average=ff.ema(0.5))
    made = one.convert(trained_by(one), other)
    assert torch.equal(made.ema["0.weight"], made.params["0.weight"])
    moved = run(other, made, labelled_batches(1))
    assert torch.equal(other.convert(moved, other).ema["0.weight"], moved.ema["0.weight"])
    fresh = other.convert(moved, other, without={"ema", "optimizer", "progress"})
    assert torch.equal(fresh.ema["0.weight"], moved.params["0.weight"])
    assert (fresh.step, int(fresh.updates), fresh.opt["count"].tolist()) == (0, 0, [0.0] * 4)


def test_in_the_middle_of_a_stream():
    data = ff.batches(labelled_batches(1, 40)[0], batch_size=8)
    one, other = program(classifier, optimizer=FROZEN), program(classifier)
    state = ff.last(ff.until(steps=3)(one.steps(one.init(0), data)))
    state = ff.last(ff.until(steps=5)(other.steps(one.convert(state, other), data)))
    assert (state.step, state.samples, int(state.updates)) == (5, 40, 5)


def test_one_process_to_accelerated_and_back():
    one = program(classifier)
    other = ff.accelerated(one.plan)
    state = trained_by(one)
    made = one.convert(state, other)
    assert_equal(other.convert(made, one), state)
    assert_equal(run(one, other.convert(made, one), labelled_batches(2)), run(one, state, labelled_batches(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"the other program has no parameter '3\.weight'; it has .*dropping=\['3\.weight'\]"),
        ({"dropping": ["3.wieght"]}, r"dropping='3\.wieght' matches no parameter; there are '3\.weight'"),
        (
            {"without": {"optimiser"}},
            r"without=\{'optimiser'\}: expected a set of names out of \['controls', 'ema'",
        ),
        ({"without": "ema"}, "without='ema': expected a set"),
    ],
)
def test_what_has_no_place_is_refused(changes, message):
    one, other = program(Longer), program(classifier)
    state = one.init(0)
    with pytest.raises(ValueError, match=message):
        one.convert(state, other, **changes)


def test_other_shapes_are_refused_unless_dropped():
    one, other = program(classifier), program(lambda: classifier(hidden=8))
    state = trained_by(one)
    with pytest.raises(ValueError, match=r"0\.weight is \(7, 5\) in the state, and \(8, 5\) in the other program"):
        one.convert(state, other)
    made = one.convert(state, other, dropping=["0.*", "2.weight"])
    assert torch.equal(made.params["2.bias"], state.params["2.bias"])
    assert made.opt["count"].tolist() == [0.0, 0.0, 0.0, 3.0]
    assert not made.opt["exp_avg"]["2.weight"].any()


def test_a_consumed_state_is_refused():
    one = program(classifier)
    state = one.init(0)
    one.step(state, labelled_batches(1)[0])
    with pytest.raises(ff.ConsumedStateError):
        one.convert(state, program(classifier))


def test_states_in_parts_are_refused():
    one = program(classifier)
    state = one.init(0)
    with pytest.raises(ValueError, match="a process has only its shards"):
        one.convert(state, attrs.evolve(program(classifier), whole=lambda state, /: None))
