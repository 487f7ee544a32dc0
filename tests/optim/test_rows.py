import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import forgather_fn as ff
from forgather_fn.finite import BAD, FINE
from forgather_fn.flat import Flat, Hyper, layout_of, zeros
from forgather_fn.gradient import Gradients
from forgather_fn.optim import UpdateContext
from forgather_fn.optim.rows import operands
from tests.optim.comparing import STORAGES
from tests.toys import classifier, labelled, program, unchanged

HYPERS = {"a": Hyper(weight_decay=0.1), "b": Hyper(weight_decay=0.0), "c": Hyper(2.0, 0.1)}


def three() -> tuple[Flat, Gradients]:
    layout = layout_of({name: torch.zeros(70) for name in "abc"}, HYPERS)
    params, flat = zeros(layout, torch.device("cpu")), zeros(layout, torch.device("cpu"))
    return params, Gradients(layout, (True, False, True), {name: flat[name] for name in "ac"}, flat, 1, 1.0)


def test_rows_have_the_values_of_their_leaves():
    params, gradients = three()
    (one,) = operands(gradients, params)
    rate, decay = one.hypers(params.layout, UpdateContext(0.5, FINE))
    held = params.copy()
    for values, expected in [(rate, {"a": 0.5, "b": 0.5, "c": 1.0}), (decay, {"a": 0.1, "b": 0.0, "c": 0.1})]:
        held.buffers[0].view(-1, params.layout.unit(0)).copy_(values.expand(one.held[0].shape))
        for name, value in expected.items():
            assert held[name].eq(torch.tensor(value)).all(), name
    spread = one.spread(torch.tensor([1.0, 2.0, 3.0]))
    held.buffers[0].view(-1, params.layout.unit(0)).copy_(spread.expand(one.held[0].shape))
    assert [held[name].unique().tolist() for name in "abc"] == [[1.0], [2.0], [3.0]]


def test_a_value_that_all_share_stays_a_number():
    params, gradients = three()
    (one,) = operands(gradients, params)
    assert one.constant([0.5, 0.5, 0.5]) == 0.5
    assert isinstance(one.constant([0.5, torch.tensor(0.5), 0.5]), torch.Tensor)


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_what_has_no_gradient_or_is_flagged_stays(flag):
    params, gradients = three()
    (one,) = operands(gradients, params)
    one.write((torch.ones_like(one.held[0]),), gradients.active, torch.tensor(flag))
    assert [params[name].unique().item() for name in "abc"] == [1.0 - flag, 0.0, 1.0 - flag]


def test_what_is_known_of_a_layout_is_never_a_tensor_without_values():
    params, gradients = three()
    with FakeTensorMode():
        fake = zeros(params.layout, torch.device("cpu"))
        next(operands(Gradients(params.layout, gradients.active, dict(fake), fake, 1, 1.0), fake))
    (one,) = operands(gradients, params)
    assert type(one.owners) is torch.Tensor


OPTIMIZERS = {
    "lion": ff.optim.lion(weight_decay=0.1),
    "adafactor": ff.optim.adafactor(beta1=0.9),
    "muon": ff.optim.muon(match="*.weight"),
    "schedule_free": ff.optim.schedule_free_adamw(),
    "lookahead": ff.optim.lookahead(ff.adamw(), steps=1),
    "adamw_bfloat16": ff.optim.adamw_bfloat16(),
    "master": ff.optim.master_weights(ff.adamw()),
    "partitioned": ff.optim.partitioned({"a": ("0.*", ff.sgd(momentum=0.9)), "b": ("*", ff.optim.lion())}),
}


@STORAGES
@pytest.mark.parametrize("flag", [BAD, torch.tensor(1.0)], ids=["host", "device"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_nothing_changes_where_the_flag_is_set(optimizer, flag, viewed_elements):
    # The flag is known on a CPU, and a tensor on an accelerator: both ways are taken here.
    made = program(classifier(), optimizer=optimizer, viewed_elements=viewed_elements)
    state, _ = made.step(made.init(0), labelled(6))
    gradients, _, _ = made.gradients(state, labelled(6, seed=1))
    arrays = state.read()
    with unchanged(state), torch.no_grad():
        optimizer.update(gradients, arrays.opt, arrays.params, UpdateContext(0.1, flag))


@STORAGES
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_flag_on_the_device_that_is_not_set_gives_the_same_update(optimizer, viewed_elements):
    found = []
    for flag in (FINE, torch.tensor(0.0)):
        made = program(classifier(), optimizer=optimizer, viewed_elements=viewed_elements)
        state, _ = made.step(made.init(0), labelled(6))
        gradients, _, _ = made.gradients(state, labelled(6, seed=1))
        arrays = state.read()
        with torch.no_grad():
            optimizer.update(gradients, arrays.opt, arrays.params, UpdateContext(0.1, flag))
        found.append(state)
    assert ff.difference(*found) is None
