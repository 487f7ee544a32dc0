"""The run of the demonstration: a plan, a program, and a pipe of stages."""

import functools
import importlib.metadata
import json
import math
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final, Literal

import attrs
import toolz
import torch
from tqdm import tqdm

import forgather_fn as ff
from forgather_fn import interrupt
from forgather_fn.checkpoint import CheckpointError, latest
from forgather_fn.demo import Settings
from forgather_fn.demo.model import Transformer
from forgather_fn.demo.text import Text, held_out_windows, labelled, read, training_windows
from forgather_fn.fingerprint import fingerprint
from forgather_fn.random import key
from forgather_fn.reports import bar, curve, jsonl, tensorboard
from forgather_fn.reports.path import naming

RECORD: Final = "run.json"
"""Where, in the run directory, its settings are written down."""


def train(settings: Settings) -> str:
    """Train a language model, telling how it goes on the terminal and in the run directory.

    Written there are checkpoints, TensorBoard events, ``metrics.jsonl`` and ``curve.svg``. A run that was stopped, in
    whatever way, goes on where it was last saved, and ends at the same bits. Nothing is trained, and nothing written,
    before all settings were found to be usable.

    Returns:
        The fingerprint of the final weights.

    Raises:
        ValueError: A setting cannot be used.
        KeyboardInterrupt: Ctrl-C has ended the training; what there is, is saved and told.
    """
    program = program_of(settings)
    state = program.init(settings.seed)
    say = print if program.world.main else _nothing
    text = read(settings.data, settings.context)
    prepare(settings.run)
    training = stream(settings, text)
    held_out = ff.batches(held_out_windows(text, settings.context), batch_size=64, collate=labelled)
    say(f"text   {text.description}")
    held = program.world.gather(sum(map(torch.numel, state.params.values())))
    say(f"model  {sum(held):,} parameters")
    if program.world.first(lambda: latest(settings.run) is not None):
        state = restored(program, settings.run)
        say(f"found  {settings.run} at step {state.step}: going on from there (another --run starts anew)")
    program.world.first(lambda: remember(settings, text))

    with ff.serve(settings.run) as inbox, interrupt.listening() as signalled:
        if inbox.job is not None:
            say(f"control  forgather control watch {inbox.job}  (in another terminal)")
        state = toolz.pipe(
            program.steps(state, training),
            ff.at({1, *range(100, settings.steps, 100), settings.steps}, ff.evaluated(held_out), bits_per_byte, show),
            ff.at(
                {1, *range(10, settings.steps, 10), settings.steps},
                ff.report(bar("demo"), tensorboard(settings.run), jsonl(settings.run / "metrics.jsonl")),
            ),
            ff.every(max(100, settings.steps // 10), ff.saved(settings.run)),
            ff.controlled(inbox),
            ff.until(steps=settings.steps),
            ff.last,
        )
        interrupted = signalled() == signal.SIGINT

    if program.world.main:
        curve(settings.run / "metrics.jsonl", settings.run / "curve.svg", title="Loss, nats per byte")
    say(f"\n{readable(sample(program, state, length=200, context=settings.context))}\n")
    say(
        f"written to {settings.run}: checkpoints, metrics.jsonl, curve.svg, TensorBoard events "
        f"(tensorboard --logdir {settings.run})"
    )
    say(f"{versions()}, device {settings.device}, text {text.digest}, step {state.step}")
    weights = fingerprint(dict(program.export(state).named_parameters()) if settings.pipeline else state.params)
    say(f"fingerprint: {weights}")
    if interrupted:
        raise KeyboardInterrupt(f"{settings.run} is saved at step {state.step}; the same command goes on from there")
    return weights


def program_of(settings: Settings) -> ff.Program:
    """Make the program: of one device, or of a pipeline, through which two microbatches a stage go."""
    if not settings.pipeline:
        return ff.single(plan(settings))
    ends = [i * settings.layers // settings.pipeline - 1 for i in range(1, settings.pipeline)]
    cut: dict[str, Literal["beginning", "end"]] = {f"blocks.{end}": "end" for end in ends}
    if len(cut) < settings.pipeline - 1 or settings.pipeline < 2 or "blocks.-1" in cut:
        raise ValueError(f"pipeline={settings.pipeline}: {settings.layers} layers cannot be cut into so many stages")
    return ff.pipelined(attrs.evolve(plan(settings), microbatches=2 * settings.pipeline), cut)


def _nothing(*args: object, **kwargs: object) -> None:
    """Say nothing: the first process speaks for all."""


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


def restored(program: ff.Program, run: Path) -> ff.TrainState:
    """Read the latest checkpoint of the run.

    Raises:
        ValueError: It was made with other settings, or none is whole.
    """
    try:
        return program.restore(run)
    except CheckpointError as error:
        reason = str(error).partition("Use the plan")[0].rstrip()
        raise ValueError(f"{reason}\nChoose another directory with --run, or remove {run}") from None


def stream(settings: Settings, text: Text) -> ff.Stream:
    """Say in what order the model sees the text."""
    return ff.batches(training_windows(text, settings.context), batch_size=settings.batch_size, collate=labelled)


def remember(settings: Settings, text: Text) -> None:
    """Write down what the run is made of, for whoever goes on with it or replays a step.

    Raises:
        ValueError: The directory holds a run with another seed or text.
    """
    path = settings.run / RECORD
    chosen = attrs.asdict(settings, filter=lambda field, value: field.name not in ("run", "device"))
    record = {**chosen, "data": str(settings.data) if settings.data else None, "text": text.digest}
    if path.exists():
        found = json.loads(path.read_text())
        unlike = [name for name in ("seed", "text") if found.get(name) != record[name]]
        if unlike and latest(settings.run):
            raise ValueError(
                f"{settings.run} holds a run with another {' and '.join(unlike)}; choose another directory with --run, "
                "or remove it"
            )
    path.write_text(json.dumps(record, indent=1))


def rebuilt(run: Path) -> tuple[ff.Program, ff.Stream]:
    """Make the program and the stream of a run again, for ``forgather replay``.

    Raises:
        ValueError: The directory holds no demonstration.
    """
    with naming(run / RECORD, "the run of a demonstration"):
        record = json.loads((run / RECORD).read_text())
    del record["text"]
    settings = Settings(run=run, **record)
    return program_of(settings), stream(settings, read(settings.data, settings.context))


def bits_per_byte(tick: ff.Tick) -> dict[str, float]:
    """Give the evaluation loss in bits: how large the text would be, compressed with this model."""
    return {"bits_per_byte": tick.results["eval_loss"] / math.log(2)}


def show(tick: ff.Tick) -> None:
    """Print an evaluation, above the bar where there is one."""
    if not tick.run.program.world.main:
        return
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
