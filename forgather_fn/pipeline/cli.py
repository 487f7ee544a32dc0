"""``forgather pipeline explain``: what a pipeline would be, without starting one."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgather_fn.importing import import_named
from forgather_fn.pipeline.schedules import KINDS, kind_of

if TYPE_CHECKING:
    from torch import nn


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather pipeline`` to a parser, and give what prints the page."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=["explain"], help="what is done: the pipeline is shown")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a config.json of Hugging Face, or its directory, or module:function; it is built without memory",
    )
    parser.add_argument("--stages", type=int, metavar="N", help="how many stages (default: from --split, or --ranks)")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="how many processes (default: as many as fit the stages)"
    )
    parser.add_argument("--schedule", default="1F1B", help=f"one of {', '.join(k.name for k in KINDS.values())}")
    parser.add_argument("--microbatches", type=int, metavar="N", help="in a step (default: twice the stages)")
    parser.add_argument("--split", metavar="JSON", help="""where it is cut: {"layer.4": "end"} (default: evenly)""")
    parser.add_argument("--width", type=int, metavar="N", help="columns of the page (default: the terminal's)")
    parser.epilog = (
        "examples:\n"
        "  forgather pipeline explain config.json --stages 4 --microbatches 8\n"
        "  forgather pipeline explain my.models:large --ranks 8 --stages 16 --schedule ZBVZeroBubble"
    )

    def execute(options: argparse.Namespace) -> int:
        print(page(options))
        return 0

    return execute


def page(options: argparse.Namespace) -> str:
    """Make the page that the options ask for.

    Raises:
        ValueError: The model cannot be built, cut, or run on so many processes.
    """
    from forgather_fn.pipeline.explaining import explain  # when used, as torch is everywhere in this module

    spec = _split(options.split)
    held = kind_of(options.schedule).stages
    stages = options.stages or (len(spec) + 1 if spec else (options.ranks or 2) * (held or 1))
    if spec and stages != len(spec) + 1:
        raise ValueError(f"--stages {stages}, but --split has {len(spec)} cuts and so {len(spec) + 1} stages")
    ranks = options.ranks or max(1, stages // (held or 1))
    explained = explain(
        _model(options.model),
        spec or "auto",
        schedule=options.schedule,
        ranks=ranks,
        microbatches=options.microbatches or 2 * stages,
        stages=stages,
        width=options.width or shutil.get_terminal_size((100, 20)).columns,
    )
    return str(explained)


def _split(text: str | None) -> Any:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"""--split {text!r} is not JSON such as {{"layer.4": "end"}}: {error}""") from None
    if not isinstance(found, dict):
        raise ValueError(f"""--split {text!r} is no JSON object such as {{"layer.4": "end"}}""")
    return found


def _model(name: str) -> "nn.Module":
    """Build a model without memory."""
    import torch

    path = Path(name)
    with torch.device("meta"):
        if path.exists():
            return _hugging_face(path / "config.json" if path.is_dir() else path)
        module, colon, function = name.partition(":")
        if not colon:
            raise ValueError(f"{name!r} is no file, and not module:function")
        try:
            built = getattr(import_named(module), function)()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{name!r} cannot be built: {error}; expected a function that takes nothing and gives the model"
            ) from error
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"{name!r} gave {type(built).__name__}; expected a torch.nn.Module")
    return built


def _hugging_face(path: Path) -> "nn.Module":
    """Build the model that a configuration names, or the causal language model of its kind."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no configuration of a Hugging Face model: {error}") from None
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((one for one in named if one is not None), None)
    model: nn.Module = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model
