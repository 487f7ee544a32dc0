"""The ``gpu`` row: a GPT of 124 million parameters in bfloat16, against a loop in the style of nanoGPT.

Where there is no CUDA device there is nothing to measure, and the row says so.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch.nn.utils import clip_grad_norm_

import forgather_fn as ff
from benchmarks import models
from benchmarks.measure import spread
from benchmarks.models import Shape, next_token_loss
from benchmarks.table import Reach, Table
from benchmarks.task import WEIGHT_DECAY, optimizer_of

SHAPE = Shape(vocabulary=50304, width=768, layers=12, heads=12, context=1024)
BATCH: Final = 8
ROUNDS: Final = 9
STEPS: Final = 20
RATE: Final = 6e-4


def run(quick: bool) -> Iterator[Table]:
    """Measure tokens a second, and how long the device waits between two steps."""
    if not torch.cuda.is_available():
        yield Table(title="GPU", columns=("loop",), lines=(("no CUDA device: not measured",),))
        return
    rounds, steps = (1, 2) if quick else (ROUNDS, STEPS)
    arms = {"nanoGPT's loop, torch.compile": _by_hand(), "forgather_fn, compile=True": _by_library()}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    idle: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, step in arms.items():
            wall, busy = _timed(step, steps)
            rates[name].append(steps * BATCH * SHAPE.context / wall)
            idle[name].append(max(0.0, 1 - busy / wall))
    theirs, ours = (statistics.median(found) for found in rates.values())
    gap = statistics.median(idle["forgather_fn, compile=True"])
    yield Table(
        title=f"GPT, 124 M parameters, bfloat16, {BATCH} x {SHAPE.context} tokens, {torch.cuda.get_device_name()}",
        columns=("loop", "thousand tokens a second", "idle share"),
        lines=tuple((name, spread(rates[name], 1e3), f"{statistics.median(idle[name]):.4f}") for name in arms),
        reach=(
            Reach("time a token, against nanoGPT's loop", theirs / ours, 1.0),
            Reach("idle share of the device", gap, 0.01),
        ),
        results=tuple({"arm": name, "tokens_per_second": rates[name], "idle": idle[name]} for name in arms),
    )


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SHAPE.vocabulary, (BATCH, SHAPE.context), generator=generator).cuda()


def _by_hand() -> Callable[[], None]:
    """Train as https://github.com/karpathy/nanoGPT does: autocast, a compiled model, clipping, fused AdamW."""
    model = models.built(SHAPE).cuda()
    optimizer = optimizer_of(model)
    compiled, tokens = torch.compile(model), _tokens()

    def step() -> None:
        for options in optimizer.param_groups:
            options["lr"] = RATE
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = next_token_loss(compiled(tokens), tokens)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _by_library() -> Callable[[], None]:
    plan = ff.Plan(
        model=lambda: models.built(SHAPE),
        loss=ff.losses.causal_lm,
        optimizer=ff.adamw(weight_decay=WEIGHT_DECAY),
        schedule=RATE,
        transforms=(ff.clipped(1.0),),
        precision="bfloat16",
        compile=True,
        device="cuda",
    )
    program = ff.single(plan)
    held, tokens = [program.init(0)], _tokens()
    batch = {"input_ids": tokens, "labels": tokens}

    def step() -> None:
        held[0], _ = program.step(held[0], batch)

    return step


def _timed(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Give the seconds that some steps take, on the wall and of the device's work, after some that are not timed."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    wall = time.perf_counter() - began
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return wall, sum(event.device_time_total for event in recorded.key_averages()) / 1e6
