"""Where to cut a model so that its stages are about equal: by the numbers of their parameters, or by what they take."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from forgather_fn.model import evaluation_mode, parameter_sites
from forgather_fn.pipeline.cuts import SplitError


def balanced(model: nn.Module, stages: int, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Choose cuts at the ends of a model's blocks, so that the largest stage is as small as it can be.

    Its blocks are the children of its largest list of modules: the layers of a language model, as a rule. What was
    registered before them belongs to the first stage, what comes after to the last.

    Args:
        model: Its tensors may be on the meta device.
        stages: How many.
        seconds: What each module takes, by name, as :func:`measured` finds it; parameters are counted if not given.

    Returns:
        A ``split_spec``.

    Raises:
        SplitError: The model has no list of so many blocks.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
        >>> balanced(model, 3)
        {'1': 'end', '3': 'end'}
    """
    name, blocks = _blocks(model)
    if len(blocks) < stages:
        raise SplitError(
            f"split_spec='auto': {stages} stages need as many blocks, and the model's largest list of modules, "
            f"{name or 'the model itself'}, has {len(blocks)}"
        )
    weights = [_weight(model, f"{name}.{i}" if name else i, seconds) for i in blocks]
    before, after = _around(model, name, seconds)
    weights[0] += before
    weights[-1] += after
    return {f"{name}.{blocks[i - 1]}" if name else blocks[i - 1]: "end" for i in _boundaries(weights, stages)}


def _blocks(model: nn.Module) -> tuple[str, list[str]]:
    """Find the list of modules with the most parameters, by its name, and the names of its modules in it."""
    lists = {name: child for name, child in model.named_modules() if isinstance(child, nn.ModuleList | nn.Sequential)}
    if not lists:
        raise SplitError("split_spec='auto': the model has no nn.ModuleList and no nn.Sequential of blocks")
    # Of lists inside others, as many blocks as possible: the outer one has the inner one's parameters too.
    name = max(lists, key=lambda name: (_count(lists[name]), len(lists[name]), len(name)))
    return name, [key for key, _ in lists[name].named_children()]


def _count(module: nn.Module) -> int:
    return sum(site.tensor.numel() for site, name in parameter_sites(module) if site.name == name)


def _weight(model: nn.Module, name: str, seconds: Mapping[str, float] | None) -> float:
    return seconds.get(name, 0.0) if seconds is not None else float(_count(model.get_submodule(name)))


def _around(model: nn.Module, blocks: str, seconds: Mapping[str, float] | None) -> tuple[float, float]:
    """Weigh what comes before the blocks, and what comes after."""
    names = [name for name, _ in model.named_modules()]
    place = names.index(blocks)
    before = after = 0.0
    for i, name in enumerate(names):
        child = model.get_submodule(name)
        if name == blocks or (name.startswith(f"{blocks}." if blocks else "") and name):
            continue
        if seconds is None:
            own = float(sum(p.numel() for p in child._parameters.values() if p is not None))
        else:
            own = seconds.get(name, 0.0) if not any(True for _ in child.children()) else 0.0
        before, after = (before + own, after) if i < place else (before, after + own)
    return before, after


def _boundaries(weights: Sequence[float], stages: int) -> list[int]:
    """Cut a row of weights into so many parts, none empty, of which the heaviest is as light as can be."""
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    best: list[list[float]] = [[float("inf")] * (len(weights) + 1) for _ in range(stages + 1)]
    cut: list[list[int]] = [[0] * (len(weights) + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for parts in range(1, stages + 1):
        for end in range(parts, len(weights) + 1):
            for start in range(parts - 1, end):
                heaviest = max(best[parts - 1][start], sums[end] - sums[start])
                if heaviest < best[parts][end]:
                    best[parts][end], cut[parts][end] = heaviest, start
    found, end = [], len(weights)
    for parts in range(stages, 0, -1):
        end = cut[parts][end]
        found.append(end)
    return sorted(found)[1:]


def measured(
    model: nn.Module, call: Callable[[], Any], *, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Measure what each module of a model takes to run forward: seconds, the least of some runs.

    Args:
        model: With values; left as it was.
        call: Calls it on an example.
        repeats: How often.
        clock: Gives seconds.
    """
    least: dict[str, float] = {}
    begun: list[float] = []
    taken: dict[str, float] = {}
    handles = []
    for name, child in model.named_modules():

        def end(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            taken[name] = taken.get(name, 0.0) + clock() - begun.pop()

        handles.append(child.register_forward_pre_hook(lambda module, args: begun.append(clock())))
        handles.append(child.register_forward_hook(end))
    modes = evaluation_mode(model)
    try:
        with torch.no_grad():
            for _ in range(repeats):
                taken.clear()
                call()
                least = {name: min(seconds, least.get(name, seconds)) for name, seconds in taken.items()}
    finally:
        modes.restore()
        for handle in handles:
            handle.remove()
    return least
