"""What a demonstration is asked for: defaults, and what is refused."""

import argparse
import math
from pathlib import Path

import attrs
import pytest

from forgather_fn.demo import Settings, command


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    command(parser)
    return vars(parser.parse_args(arguments))


def test_the_options_are_the_settings():
    assert parsed() == attrs.asdict(Settings())
    given = (
        "--run a --data b --device cuda:1 --seed 2 --steps 3 --batch-size 4 --context 5 --width 6 --layers 7 --heads 8"
    )
    assert Settings(**parsed(*given.split(), "--learning-rate", "9")) == Settings(
        run=Path("a"),
        data=Path("b"),
        device="cuda:1",
        seed=2,
        steps=3,
        batch_size=4,
        context=5,
        width=6,
        layers=7,
        heads=8,
        learning_rate=9.0,
    )


def test_help_names_every_default():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    command(parser)
    text = parser.format_help()
    for name, value in attrs.asdict(Settings()).items():
        assert f"--{name.replace('_', '-')} " in text
        assert f"(default: {'Python' if value is None else value}" in text


@pytest.mark.parametrize(
    ("name", "least"),
    [("seed", 0), ("steps", 1), ("batch_size", 1), ("context", 2), ("width", 1), ("layers", 1), ("heads", 1)],
)
def test_numbers_that_are_too_small_are_refused(name, least):
    assert getattr(Settings(**{name: least}), name) == least
    for value in (least - 1, float(least)):
        with pytest.raises(ValueError, match=f"^{name}={value}: expected an integer of at least {least}$"):
            Settings(**{name: value})


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_a_learning_rate_is_positive_and_finite(value):
    with pytest.raises(ValueError, match=f"^learning_rate={value}: expected a positive, finite number$"):
        Settings(learning_rate=value)


def test_paths_may_be_given_as_text():
    assert Settings(run="a/b", data="c") == Settings(run=Path("a/b"), data=Path("c"))
