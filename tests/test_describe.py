import functools

import attrs
import numpy as np
import pytest
import torch

import forgather_fn as ff
from forgather_fn.describe import describe, described


@described
def scaled(factor, /, *others, offset=0, **named):
    del others, named
    return lambda value: factor * value + offset


@attrs.frozen(repr=False)
class Record:
    value: int
    description: str = ""


@described
def record(value=3):
    return Record(value)


class Called:
    def __call__(self, outputs, batch):
        return outputs

    def method(self, outputs, batch):
        return outputs


def test_a_closure_prints_as_the_call_that_made_it():
    made = scaled(2, 5, 6, mode=len)
    assert repr(made) == describe(made) == "scaled(factor=2, 5, 6, offset=0, mode=builtins.len)"
    assert made(10) == 20
    assert scaled.__name__ == "scaled"


def test_described_closures_compare_by_their_text():
    assert scaled(2) == scaled(2)
    assert scaled(2) != scaled(3)
    assert hash(scaled(2)) == hash(scaled(2))


def test_a_record_gets_the_call_as_its_description():
    made = record(value=5)
    assert made.value == 5
    assert made.description == describe(made) == "record(value=5)"
    assert record().description == "record(value=3)"


def test_wrong_arguments_fail_as_those_of_the_function_itself():
    with pytest.raises(TypeError, match="offse"):
        scaled(1, 2)(3, offse=1)
    with pytest.raises(TypeError, match="factor"):
        scaled()


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (1e-3, "0.001"),
        (None, "None"),
        ("adamw", "'adamw'"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (describe, "forgather_fn.describe.describe"),
        (functools.partial(torch.optim.SGD, [1], lr=0.1), "torch.optim.sgd.SGD([1], lr=0.1)"),
        (functools.partial(describe, torch.optim.SGD), "forgather_fn.describe.describe(torch.optim.sgd.SGD)"),
        ((ff.clipped(1.0), ff.noise(0.5)), "(clipped(max_norm=1.0), noise(std=0.5))"),
        ([1, (2, 3), ()], "[1, (2, 3), ()]"),
    ],
)
def test_parts_are_named_by_what_they_are(part, text):
    assert describe(part) == text


@pytest.mark.parametrize(
    "part",
    [
        Called(),
        Called().method,
        lambda outputs, batch: outputs,
        functools.partial(Called(), 1),
        ff.adamw(decays=lambda name, tensor: True),
        ff.adamw(groups=[ff.group(lambda name, tensor: True, learning_rate=2.0)]),
        ff.from_torch(lambda groups: torch.optim.SGD(groups)),
        ff.stateless(lambda gradient: gradient),
        ff.Transform(lambda params: None, lambda gradients, state, **kwargs: (gradients, state)),
        ff.losses.from_output(weight=lambda batch: 1.0),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_description_holds_no_memory_address(part):
    # It goes into checkpoints, and is compared with that of a later process.
    assert " at 0x" not in describe(part)


def test_a_plan_describes_every_part():
    def description(**changes):
        plan = {
            "model": torch.nn.Linear(2, 3),
            "loss": ff.losses.cross_entropy,
            "optimizer": ff.adamw(weight_decay=0.1, groups=[ff.group("*.bias", frozen=True)]),
            "schedule": ff.schedules.constant(1e-3),
            "transforms": [ff.clipped(1.0)],
            "average": ff.ema(0.9),
        }
        return ff.Plan(**(plan | changes)).describe()

    whole = description()
    assert set(whole) == {field.name for field in attrs.fields(ff.Plan)}
    assert whole["loss"] == "cross_entropy"
    assert whole["average"] == "ema(decay=0.9)"
    assert whole["transforms"] == "(clipped(max_norm=1.0),)"
    assert whole["model"] == "torch.nn.modules.linear.Linear"
    assert "weight_decay=0.1" in whole["optimizer"]
    assert description() == whole
    for changes in ({"transforms": ()}, {"average": ff.ema(0.8)}, {"microbatches": 2}, {"optimizer": ff.sgd()}):
        assert {name for name, text in description(**changes).items() if text != whole[name]} == set(changes)
    assert "frozen=True" in whole["optimizer"]
    assert "*.bias" in whole["optimizer"]


def test_numbers_of_numpy_print_and_count_as_those_of_python():
    made = ff.adamw(betas=(np.float64(0.9), np.float32(0.5)), weight_decay=np.float32(0.5))
    assert repr(made) == repr(ff.adamw(betas=(0.9, 0.5), weight_decay=0.5))
    assert ff.schedules.linear(peak=np.float32(0.5), total=np.int64(4))(1) == 0.375
