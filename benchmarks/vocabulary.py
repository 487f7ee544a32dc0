"""What a loss in chunks saves where the vocabulary is large."""

from typing import Final

import torch
from torch import nn

import forgather_fn as ff
from benchmarks.measure import most_held
from benchmarks.table import Reach, Table

LIMIT: Final = 0.35
"""Of the peak with all logits, at a vocabulary of 128 k words."""


def table(words: int, time: int) -> Table:
    """Train a small language model with all logits at one time, and in chunks.

    Args:
        words: In the vocabulary.
        time: Tokens of each of 4 samples.
    """
    losses = {
        "causal_lm": ff.losses.causal_lm,
        "chunked causal_lm": ff.losses.chunked(ff.losses.causal_lm, tokens=128, head="2"),
    }
    held = {name: most_held(lambda loss=loss: _trained(loss, words, time)) for name, loss in losses.items()}
    base, first = held["causal_lm"]
    last = held["chunked causal_lm"][1]
    if abs(last - first) > 1e-5 * abs(first):
        raise ValueError(f"the losses differ: {first} with all logits, {last} in chunks")
    ratio = held["chunked causal_lm"][0] / base
    return Table(
        title=f"Peak memory of a step: {words:,} words, {4 * time:,} tokens",
        notes=("A language model of width 64 with tied embeddings, AdamW; two steps, from before the model is built.",),
        columns=("loss", "MB", "ratio"),
        lines=tuple((name, f"{peak / 1e6:.1f}", f"{peak / base:.3f}") for name, (peak, _) in held.items()),
        reach=(Reach("chunked causal_lm, peak memory", ratio, LIMIT),) if words > 100_000 else (),
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
