"""The ``memory`` row: the most memory that torch holds at one time while an arm trains.

Every allocation and release of torch's CPU allocator is recorded by torch's profiler, from before the model is built to
the end of the run. The peak of their running sum is exact to the byte, and the same in every run. Resident memory is
neither: it begins with 300 MB of libraries, and keeps what the C library does not give back. Not seen is what does not
pass through that allocator: Python's own objects, and scratch memory of kernels, which are the same in every arm.
"""

from collections.abc import Iterator
from typing import Final

import attrs
import torch
from torch import nn

import forgather_fn as ff
from benchmarks import compiled, estimates
from benchmarks.arms import LOADED, OURS, PEERS_LOADED, installed, left_out
from benchmarks.measure import Arm, Clock, check_losses, most_held
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import Task

LIMITS: Final = {LARGE: 1.02}
"""Against the hand-written loop. On smaller models gradients stay in place between steps, which is faster and takes
their size more while the model runs: 4 bytes a parameter."""


def run(quick: bool) -> Iterator[Table]:
    """Measure each model; quick: the smallest, without peers."""
    for task in (SMALL,) if quick else (SMALL, DEEP, LARGE):
        short = attrs.evolve(task, warmup=2, steps=3)
        arms = LOADED if quick else (*LOADED, *compiled.memory_arms(), *installed(PEERS_LOADED))
        held = [(arm, *peak(arm, short)) for arm in arms]
        check_losses((arm, short.loss(model)) for arm, _, model in held)
        base = held[0][1]
        peaks = {arm.name: peak for arm, peak, _ in reversed(held)}
        goals = [name for name in (OURS, compiled.WHOLE) if task in LIMITS and name in peaks]
        yield Table(
            title=f"Peak memory: {task.size}",
            notes=(
                "Of torch's CPU allocator, as its profiler records it: exact, and the same in every run.",
                *left_out(),
            ),
            columns=("loop", "data loading", "MB", "ratio"),
            lines=tuple((arm.name, arm.data, f"{peak / 1e6:.3f}", f"{peak / base:.3f}") for arm, peak, _ in held),
            reach=tuple(Reach(f"{name}, peak memory", peaks[name] / base, LIMITS[task]) for name in goals),
            results=tuple({"arm": arm.name, "data": arm.data, "bytes": peak} for arm, peak, _ in held),
        )
    yield vocabulary(1_000 if quick else 131_072, 64 if quick else 256)
    yield estimates.table(quick)


CHUNKED_LIMIT: Final = 0.35
"""Of the peak with all logits, at a vocabulary of 128 k words."""


def vocabulary(words: int, time: int) -> Table:
    """Train a small language model with all logits at one time, and in chunks.

    Args:
        words: In the vocabulary.
        time: Tokens of each of 4 samples.
    """
    losses = {"causal_lm": ff.losses.causal_lm, "chunked_causal_lm": ff.losses.chunked_causal_lm(tokens=128, head="2")}
    held = {name: most_held(lambda loss=loss: _trained(loss, words, time)) for name, loss in losses.items()}
    base, first = held["causal_lm"]
    last = held["chunked_causal_lm"][1]
    if abs(last - first) > 1e-5 * abs(first):
        raise ValueError(f"the losses differ: {first} with all logits, {last} in chunks")
    ratio = held["chunked_causal_lm"][0] / base
    return Table(
        title=f"Peak memory of a step: {words:,} words, {4 * time:,} tokens",
        notes=("A language model of width 64 with tied embeddings, AdamW; two steps, from before the model is built.",),
        columns=("loss", "MB", "ratio"),
        lines=tuple((name, f"{peak / 1e6:.1f}", f"{peak / base:.3f}") for name, (peak, _) in held.items()),
        reach=(Reach("chunked_causal_lm, peak memory", ratio, CHUNKED_LIMIT),) if words > 100_000 else (),
        results=tuple({"loss": name, "bytes": peak} for name, (peak, _) in held.items()),
    )


def _trained(loss: ff.losses.Objective, words: int, time: int) -> float:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(words, 64), nn.Linear(64, words, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), head)
    program = ff.single(ff.Plan(model=model, loss=loss, optimizer=ff.adamw(), schedule=1e-3))
    state = program.init(seed=0)
    tokens = torch.randint(0, words, (4, time))
    for _ in range(2):
        state, metrics = program.step(state, (tokens, tokens))
    return float(metrics["loss"])


def peak(arm: Arm, task: Task) -> tuple[int, nn.Module]:
    """Train, and give the largest number of bytes that were allocated at one time, and the model."""
    shared = (task.batches, task.held_out)  # what all arms use is not counted
    found = most_held(lambda: arm.train(task, Clock(task)))
    del shared
    return found
