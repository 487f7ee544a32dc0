import pytest
import torch

import forgather_fn as ff
from forgather_fn.flat import Hyper, layout_of
from forgather_fn.optim.sections import sections
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import (
    Branches,
    assert_equal,
    branching,
    classifier,
    labelled,
    labelled_batches,
    program,
    trained,
)

FALLING = ff.schedules.linear(peak=0.5, total=20)


def both(**changes):
    sgd = ff.sgd(momentum=0.9, **changes)
    return ff.optim.partitioned({"sgd": (["0.*", "left.*"], sgd), "rest": ("*", ff.adamw(weight_decay=0.3))})


def theirs(model):
    first = [p for name, p in model.named_parameters() if name.startswith(("0.", "left."))]
    rest = [p for name, p in model.named_parameters() if not name.startswith(("0.", "left."))]
    rows = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.SGD(first, momentum=0.9), torch.optim.AdamW(rows, fused=True)]


@STORAGES
@DTYPES
def test_each_part_is_updated_by_its_own(viewed_elements, dtype):
    compare(both(), theirs, dtype=dtype, viewed_elements=viewed_elements)


@STORAGES
def test_gradients_that_come_and_go(viewed_elements):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate([(1, 1), (0, 1), (1, 0), (1, 1)] * 3)]
    compare(both(), theirs, model=lambda dtype: Branches().to(dtype), batches=batches, viewed_elements=viewed_elements)


@STORAGES
def test_a_part_of_all_is_the_optimizer_itself(viewed_elements):
    groups = [ff.group("2.*", learning_rate=0.5)]
    inner = ff.adamw(weight_decay=0.1, groups=groups)
    alone = trained(classifier(), labelled_batches(5), optimizer=inner, viewed_elements=viewed_elements)
    composed = ff.optim.partitioned({"all": ("*", ff.optim.partitioned({"inner": ("*", inner)}))})
    state = trained(classifier(), labelled_batches(5), optimizer=composed, viewed_elements=viewed_elements)
    for name, tensor in alone.params.items():
        assert torch.equal(state.params[name], tensor)
        assert torch.equal(state.opt["all"]["inner"]["exp_avg"][name], alone.opt["exp_avg"][name])


def test_schedules_of_parts_are_reported_behind_their_names():
    optimizer = both(weight_decay=FALLING, groups=[ff.group("0.bias", learning_rate=FALLING)])
    assert set(optimizer.schedules) == {"weight_decay/sgd", "learning_rate/sgd/0.bias"}
    made = program(classifier(), optimizer=optimizer, schedule=0.1)
    _, metrics = made.step(made.init(0), labelled(6))
    assert metrics["weight_decay/sgd"] == 0.5
    assert metrics["learning_rate/sgd/0.bias"] == 0.05


def test_schedules_of_parts_are_those_of_the_optimizers():
    inner = ff.sgd(weight_decay=FALLING, momentum=FALLING)
    composed = ff.optim.partitioned({"one": ("*.weight", inner), "other": ("*", inner)})
    state = trained(classifier(), labelled_batches(5), optimizer=composed)
    expected = trained(classifier(), labelled_batches(5), optimizer=inner)
    for name, tensor in expected.params.items():
        assert torch.equal(state.params[name], tensor)


def test_updates_in_the_backward_pass():
    changes = {"optimizer": both(), "viewed_elements": 0}
    one = trained(classifier(), labelled_batches(5), update="in_backward", **changes)
    assert_equal(one, trained(classifier(), labelled_batches(5), **changes))


def test_parts_lie_side_by_side_also_parts_of_parts():
    parts = ["b/x", "a", "b/y", "a", "b/x", "c"]
    tensors = {str(i): torch.full((100,), float(i)) for i in range(6)}
    hypers = {str(i): Hyper(weight_decay=i * 0.1, part=part) for i, part in enumerate(parts)}
    layout = layout_of(tensors, hypers)
    order = [leaf.name for leaf in sorted(layout.leaves, key=lambda leaf: leaf.offset)]
    assert order == ["0", "4", "2", "1", "3", "5"]
    found = sections(layout)
    assert {name: list(section.layout.index) for name, section in found.items()} == {
        "b": ["0", "2", "4"],
        "a": ["1", "3"],
        "c": ["5"],
    }
    assert [hyper.part for hyper in found["b"].layout.groups] == ["x", "x", "y"]


def test_a_section_is_a_view_of_its_tensors():
    state = program(classifier(), optimizer=both()).init(0)
    found = sections(state.params.layout)
    for section in found.values():
        own = section.of(state.params)
        for name in own:
            assert own[name].data_ptr() == state.params[name].data_ptr()
            assert own[name].shape == state.params[name].shape


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "expected names without a slash"),
        ({"a/b": ("*", ff.sgd())}, r"expected names without a slash.*'a/b'"),
        ({"a": ("0.*", ff.sgd())}, "'2.weight', '2.bias' match no part"),
        ({"a": ("*", ff.sgd()), "b": (["*"], ff.sgd())}, "part 'b' matches no parameter that is left"),
        ({"a": ("*", ff.sgd()), "b": ("0.*", ff.sgd())}, "part 'b' matches no parameter that is left"),
        ({"a": ("*", ff.sgd(groups=[ff.group("5.*")]))}, "group '5.*' matches no parameter"),
    ],
)
def test_what_cannot_be_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        program(classifier(), optimizer=ff.optim.partitioned(parts)).init(0)
