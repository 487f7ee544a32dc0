"""``forgather demo``: a small language model, trained on text that every machine has.

What it is asked for stands here, without torch, so that the command line can tell of it at once; ``text`` has the data,
``model`` the transformer, and ``train`` the run.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs


def _integer(least: int) -> Callable[[Any, "attrs.Attribute[int]", int], None]:
    def check(instance: Any, attribute: "attrs.Attribute[int]", value: int) -> None:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{attribute.name}={value!r}: expected an integer of at least {least}")

    return check


def _positive(instance: Any, attribute: "attrs.Attribute[float]", value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{attribute.name}={value!r}: expected a positive, finite number")


def _option(kind: Callable[[str], Any], metavar: str, text: str) -> dict[str, Any]:
    """Tell the command line how a setting is given."""
    return {"type": kind, "metavar": metavar, "help": text}


@attrs.frozen(kw_only=True)
class Settings:
    """What a demonstration is asked for. Each is an option of ``forgather demo``.

    Attributes:
        run: The directory where everything goes.
        data: A file of text, or a folder of such files; None for the running Python's standard library.
        device: As torch names it. On ``cuda``, forward and loss run in bfloat16 under autocast.
        seed: The root of all randomness.
        steps: How many optimizer steps.
        batch_size: Windows of text in a step.
        context: Bytes in a window.
        width: Of the model; a multiple of twice the heads.
        layers: How many blocks the model has.
        heads: Attention heads in each.
        pipeline: Into how many stages the model is cut, over the processes of a launcher; 0 for one device. The
            weights at the end are the same on any number of processes.
        learning_rate: The highest, after the warm-up.

    Raises:
        ValueError: A number is too small, or the learning rate is not positive and finite.
    """

    run: Path = attrs.field(
        default=Path("runs/demo"),
        converter=Path,
        metadata=_option(Path, "DIR", "where everything goes (default: %(default)s)"),
    )
    data: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(Path),
        metadata=_option(
            Path, "PATH", "a file of text, or a folder of such files (default: Python's standard library)"
        ),
    )
    device: str = attrs.field(default="cpu", metadata=_option(str, "NAME", "cpu, cuda, cuda:1 ... (default: cpu)"))
    seed: int = attrs.field(
        default=0, validator=_integer(0), metadata=_option(int, "N", "root of all randomness (default: %(default)s)")
    )
    steps: int = attrs.field(
        default=900, validator=_integer(1), metadata=_option(int, "N", "optimizer steps (default: %(default)s)")
    )
    batch_size: int = attrs.field(
        default=8, validator=_integer(1), metadata=_option(int, "N", "windows in a step (default: %(default)s)")
    )
    context: int = attrs.field(
        default=128, validator=_integer(2), metadata=_option(int, "N", "bytes in a window (default: %(default)s)")
    )
    width: int = attrs.field(
        default=128, validator=_integer(1), metadata=_option(int, "N", "of the model (default: %(default)s)")
    )
    layers: int = attrs.field(
        default=4, validator=_integer(1), metadata=_option(int, "N", "blocks of the model (default: %(default)s)")
    )
    heads: int = attrs.field(
        default=4, validator=_integer(1), metadata=_option(int, "N", "attention heads in each (default: %(default)s)")
    )
    pipeline: int = attrs.field(
        default=0,
        validator=_integer(0),
        metadata=_option(int, "N", "cut the model into N stages, over the processes of a launcher (default: do not)"),
    )
    learning_rate: float = attrs.field(
        default=3e-3, validator=_positive, metadata=_option(float, "X", "the highest (default: %(default)s)")
    )


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the settings to a parser as options, and give what runs the demonstration."""
    fields = attrs.fields(Settings)
    for field in fields:
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **field.metadata)

    def execute(options: argparse.Namespace) -> int:
        from forgather_fn.demo.train import train

        train(Settings(**{field.name: getattr(options, field.name) for field in fields}))
        return 0

    return execute
