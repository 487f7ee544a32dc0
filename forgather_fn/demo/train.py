"""The run of the demonstration: a plan, a program, and a pipe of stages."""

import functools
import hashlib
import importlib.metadata
import math
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import toolz
import torch
from torch import Tensor
from tqdm import tqdm

import forgather_fn as ff
from forgather_fn.demo import Settings
from forgather_fn.demo.model import Transformer
from forgather_fn.demo.text import labelled, read, windows
from forgather_fn.random import key
from forgather_fn.report import bar, curve, jsonl, tensorboard
from forgather_fn.report.path import naming


def train(settings: Settings) -> str:
    """Train a language model, telling how it goes on the terminal and in the run directory.

    Written there are TensorBoard events, ``metrics.jsonl`` and ``curve.svg``. Nothing is trained, and nothing written,
    before all settings were found to be usable.

    Returns:
        The fingerprint of the final weights.

    Raises:
        ValueError: A setting cannot be used.
    """
    program = ff.single(plan(settings))
    state = program.init(settings.seed)
    text = read(settings.data, settings.context)
    prepare(settings.run)
    training = ff.batches(windows(text.training, settings.context), batch_size=settings.batch_size, collate=labelled)
    held_out = ff.batches(windows(text.held_out, settings.context).spread(256), batch_size=64, collate=labelled)
    print(f"text   {text.description}")
    print(f"model  {sum(map(torch.numel, state.params.values())):,} parameters")

    state = toolz.pipe(
        program.steps(state, training),
        ff.at({1, *range(100, settings.steps, 100), settings.steps}, ff.evaluated(held_out), bits_per_byte, show),
        ff.at(
            {1, *range(10, settings.steps, 10), settings.steps},
            ff.report(bar("demo"), tensorboard(settings.run), jsonl(settings.run / "metrics.jsonl")),
        ),
        ff.until(steps=settings.steps),
        ff.last,
    )

    curve(settings.run / "metrics.jsonl", settings.run / "curve.svg", title="Loss, nats per byte")
    print(f"\n{readable(sample(program, state, length=200, context=settings.context))}\n")
    print(
        f"written to {settings.run}: metrics.jsonl, curve.svg, TensorBoard events (tensorboard --logdir {settings.run})"
    )
    print(f"{versions()}, device {settings.device}, text {text.digest}, step {state.step}")
    weights = fingerprint(state.params)
    print(f"fingerprint: {weights}")
    return weights


def plan(settings: Settings) -> ff.Plan:
    """Say how the model is trained."""
    return ff.Plan(
        model=functools.partial(Transformer, width=settings.width, layers=settings.layers, heads=settings.heads),
        loss=ff.losses.causal_lm,
        optimizer=ff.adamw(betas=(0.9, 0.99), weight_decay=0.1),
        schedule=ff.schedules.cosine(
            peak=settings.learning_rate,
            warmup=settings.steps // 10,
            total=settings.steps,
            final=settings.learning_rate / 10,
        ),
        transforms=(ff.clipped(1.0),),
        precision="bfloat16" if settings.device.startswith("cuda") else "as_built",
        device=settings.device,
    )


def bits_per_byte(tick: ff.Tick) -> dict[str, float]:
    """Give the evaluation loss in bits: how large the text would be, compressed with this model."""
    return {"bits_per_byte": tick.results["eval_loss"] / math.log(2)}


def show(tick: ff.Tick) -> None:
    """Print an evaluation, above the bar where there is one."""
    with tqdm.external_write_mode():
        print(f"step {tick.state.step:>6}  {tick.results['bits_per_byte']:.3f} bits per byte", flush=True)


def sample(program: ff.Program, state: ff.TrainState, *, length: int, context: int, temperature: float = 0.8) -> bytes:
    """Let the model write: each byte is drawn given the last ``context`` bytes, at first an end of line.

    The draws are under a key of the seed: the same state writes the same.

    Args:
        program: Whose model writes.
        state: With which parameters.
        length: How many bytes it writes.
        context: How many bytes it sees at once.
        temperature: By what its logits are divided; below 1 it prefers what is likely.
    """
    generator = torch.Generator().manual_seed(key(state.seed, "sample"))
    written = torch.tensor([list(b"\n")])
    for _ in range(length):
        logits = program.apply(state, input_ids=written[:, -context:])[0, -1].float().cpu()
        drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        written = torch.cat((written, drawn[None]), dim=1)
    return bytes(written[0, 1:].tolist())


def readable(text: bytes) -> str:
    """Decode what a model wrote; what is not UTF-8, or cannot be printed here, is shown as an escape."""
    decoded = text.decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in decoded)
    encoding = sys.stdout.encoding or "ascii"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors (SHA-256) by sorted name, data type, shape, and bytes: 64 hexadecimal digits.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.tensor([0.0, -0.0])})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> str:
    """Name what the last bits of a result depend on, besides the settings, the text and the device."""
    try:
        own = importlib.metadata.version("forgather-fn")
    except importlib.metadata.PackageNotFoundError:
        own = "(not installed)"
    parts = {"python": platform.python_version(), "torch": torch.__version__, "forgather_fn": own}
    parts["threads"] = str(torch.get_num_threads())
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def prepare(directory: Path) -> None:
    """Make the run directory, and see that it can be written to: before the training, not after it.

    Raises:
        ValueError: It cannot.
    """
    with naming(directory, "a directory that can be written to, or a new one"):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
