import pytest
import torch

import forgather_fn as ff
from tests.optim.comparing import RATE, STORAGES
from tests.toys import Branches, assert_equal, branching, classifier, labelled_batches, program, trained


def constant_gradients(optimizer, dtype, steps, *, schedule=1e-3):
    """Train 4,096 equal parameters whose gradient is always the same."""
    model = torch.nn.Linear(4096, 1, bias=False, dtype=dtype)
    torch.nn.init.ones_(model.weight)
    made = program(model, optimizer=optimizer, loss=lambda y, batch: ff.Mean(y.sum() * 0.1, 1.0), schedule=schedule)
    batch = (torch.ones(1, 4096, dtype=dtype), torch.zeros(1))
    return ff.fold(made.step, made.init(0), [batch] * steps)


def test_running_means_are_right_on_average():
    state = constant_gradients(ff.optim.adamw_bfloat16(weight_decay=0.0), torch.float32, 300)
    exact = constant_gradients(ff.adamw(weight_decay=0.0), torch.float32, 300)
    for slot in ("exp_avg", "exp_avg_sq"):
        held, expected = state.opt[slot]["weight"], exact.opt[slot]["weight"]
        assert held.dtype == torch.bfloat16
        assert len(held.unique()) > 1  # rounded by chance, each by its own
        assert held.double().mean().item() == pytest.approx(expected.double().mean().item(), rel=2e-3)
    # To the nearest, the mean square would have stopped where a step moves it by less than half the distance.
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        nearest = (nearest.float() * 0.999 + 0.01 * 0.001).bfloat16()
    assert abs(nearest.item() / exact.opt["exp_avg_sq"]["weight"].mean().item() - 1) > 0.02


def test_parameters_in_bfloat16_move_by_less_than_they_can_hold():
    # An update of 1e-4 of a parameter of 1, whose neighbours are 2**-8 and 2**-7 away.
    state = constant_gradients(ff.optim.adamw_bfloat16(weight_decay=0.0), torch.bfloat16, 50, schedule=1e-4)
    lost = constant_gradients(ff.adamw(weight_decay=0.0), torch.bfloat16, 50, schedule=1e-4)
    assert torch.equal(lost.params["weight"], torch.ones_like(lost.params["weight"]))
    assert state.params["weight"].double().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=5e-4)


@STORAGES
def test_it_stays_near_adamw(viewed_elements):
    batches = labelled_batches(20)
    changes = {"schedule": RATE, "viewed_elements": viewed_elements}
    optimizer = ff.optim.adamw_bfloat16(weight_decay=0.1, betas=(0.8, 0.95))
    state = trained(classifier(), batches, optimizer=optimizer, **changes)
    exact = trained(classifier(), batches, optimizer=ff.adamw(weight_decay=0.1, betas=(0.8, 0.95)), **changes)
    for name, tensor in exact.params.items():
        torch.testing.assert_close(state.params[name], tensor, atol=2e-2, rtol=0.0)
    assert torch.equal(state.opt["count"], exact.opt["count"])


def test_the_first_step_is_that_of_adamw():
    # Slots are rounded when they are written, not when they are used.
    state = trained(classifier(), labelled_batches(1), optimizer=ff.optim.adamw_bfloat16(weight_decay=0.1))
    exact = trained(classifier(), labelled_batches(1), optimizer=ff.adamw(weight_decay=0.1))
    for name, tensor in exact.params.items():
        torch.testing.assert_close(state.params[name], tensor, atol=2e-7, rtol=0.0)


def test_runs_repeat_to_the_bit_and_differ_by_seed():
    def run(seed):
        made = program(classifier(), optimizer=ff.optim.adamw_bfloat16())
        return ff.fold(made.step, made.init(seed), labelled_batches(4))

    assert_equal(run(0), run(0))
    assert not torch.equal(run(0).opt["exp_avg"]["0.weight"], run(1).opt["exp_avg"]["0.weight"])


def test_gradients_that_come_and_go():
    which = [(1, 1), (0, 1), (1, 0)] * 3
    batches = [branching(*on, seed=i) for i, on in enumerate(which)]
    state = trained(Branches(), batches, optimizer=ff.optim.adamw_bfloat16())
    exact = trained(Branches(), batches)
    assert torch.equal(state.opt["count"], exact.opt["count"])


def test_updates_in_the_backward_pass():
    changes = {"optimizer": ff.optim.adamw_bfloat16(weight_decay=0.1), "viewed_elements": 0}
    one = trained(classifier(), labelled_batches(5), update="in_backward", **changes)
    assert_equal(one, trained(classifier(), labelled_batches(5), **changes))
