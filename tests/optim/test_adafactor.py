import pytest
import torch
from transformers.optimization import Adafactor

import forgather_fn as ff
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import Branches, branching, classifier, decaying, program

CONSTANT = ff.schedules.constant(1e-2)


def published(weight_decay=0.0, **options):
    # Transformers' takes no learning rate where it finds it itself.
    class Relative(Adafactor):
        def step(self):
            for row in self.param_groups:
                row["lr"] = row["lr"] if not row["relative_step"] else None
            super().step()

    return lambda model: Relative(decaying(model, weight_decay), **options)


@STORAGES
@DTYPES
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"relative_step": True}, {}),
        ({"relative_step": True, "scale_parameter": False}, {"scale_parameter": False}),
        ({"relative_step": True, "beta1": 0.9, "clip_threshold": 0.5}, {"beta1": 0.9, "clip_threshold": 0.5}),
        ({"relative_step": True, "decay_power": 0.6, "eps": (1e-5, 1e-2)}, {"decay_rate": -0.6, "eps": (1e-5, 1e-2)}),
    ],
)
def test_every_step_is_that_of_transformers(viewed_elements, dtype, ours, theirs):
    compare(
        ff.optim.adafactor(**ours),
        published(**theirs),
        dtype=dtype,
        schedule=CONSTANT,
        viewed_elements=viewed_elements,
    )


@STORAGES
@pytest.mark.parametrize("scale", [False, True])
def test_with_a_schedule_it_is_that_of_transformers(viewed_elements, scale):
    compare(
        ff.optim.adafactor(weight_decay=0.0 if scale else 0.2, scale_parameter=scale),
        published(0.0 if scale else 0.2, scale_parameter=scale, relative_step=False),
        viewed_elements=viewed_elements,
    )


@STORAGES
@DTYPES
def test_every_step_is_that_of_torch(viewed_elements, dtype):
    # Torch adds no eps, but clamps with it; with next to none, both are the same.
    compare(
        ff.optim.adafactor(relative_step=True, weight_decay=0.2, eps=(1.2e-38, 1e-3)),
        lambda model: torch.optim.Adafactor(decaying(model, 0.2), eps=(1e-150, 1e-3), foreach=False),
        dtype=dtype,
        schedule=ff.schedules.linear(peak=0.4, total=25),  # above and below the relative step
        viewed_elements=viewed_elements,
    )


@STORAGES
def test_gradients_that_come_and_go(viewed_elements):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate([(1, 1), (0, 1), (1, 0), (1, 1)] * 3)]
    compare(
        ff.optim.adafactor(relative_step=True),
        published(),
        model=lambda dtype: Branches().to(dtype),
        batches=batches,
        schedule=CONSTANT,
        viewed_elements=viewed_elements,
    )


def test_tensors_of_four_dimensions_are_those_of_transformers():
    def model(dtype):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 5, 1)), torch.nn.Conv2d(1, 3, (3, 1)), torch.nn.Flatten(), torch.nn.Linear(9, 3)
        ).to(dtype)

    compare(ff.optim.adafactor(relative_step=True), published(), model=model, schedule=CONSTANT)


def test_it_keeps_rows_and_columns_only():
    state = program(classifier(), optimizer=ff.optim.adafactor()).init(0)
    assert {name: tuple(t.shape) for name, t in state.opt["rows"].items()} == {"0.weight": (7,), "2.weight": (3,)}
    assert {name: tuple(t.shape) for name, t in state.opt["columns"].items()} == {"0.weight": (5,), "2.weight": (7,)}
    assert list(state.opt["exp_avg_sq"]) == ["0.bias", "2.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, "beta1 must be a number"),
        ({"clip_threshold": 0.0}, "clip_threshold and decay_power must be above 0"),
        ({"eps": (1e-30,)}, "eps two numbers"),
        ({"eps": (0.0, 1e-3)}, "a gradient of 0 is divided by its root"),
        ({"eps": (1e-60, 1e-3)}, "a gradient of 0 is divided by its root"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ff.optim.adafactor(**options)
