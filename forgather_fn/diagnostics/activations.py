"""Statistics of what modules give out, for one batch."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from forgather_fn.batch import as_batch, as_it_came
from forgather_fn.diagnostics.names import chosen
from forgather_fn.loop import Tick
from forgather_fn.program import Program
from forgather_fn.signature import checked
from forgather_fn.stages import Observer
from forgather_fn.state import Params, TrainState
from forgather_fn.world import World


@attrs.frozen
class Activation:
    """The statistics of what one module gave out, over all its elements and calls.

    Attributes:
        elements: How many they are of.
        mean: Their mean.
        rms: The root of their mean square.
        largest: The largest magnitude; nan, if one was.
        zeros: The share of exact zeros: of units that are off behind a ReLU.
    """

    elements: int
    mean: float
    rms: float
    largest: float
    zeros: float

    @property
    def std(self) -> float:
        """The standard deviation."""
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))


@checked
def activations(
    program: Program,
    state: TrainState,
    batch: Any,
    *,
    modules: str = "*",
    params: Params = "params",
) -> dict[str, Activation]:
    """Run the model on a batch, in evaluation mode, and give the statistics of what its modules gave out.

    Nothing is changed by it: hooks are there for this one forward pass, and the state, the modules' modes, buffers and
    the random generators are left as they were. A compiled model is run as it stands. All processes of a program call
    it together; the batch is the first's: of a step's, those microbatches that it has.

    Args:
        program: Whose model it is.
        state: What it is run with.
        batch: As a step takes it.
        modules: A pattern of the shell for qualified names, such as ``"layers.*"``; the star matches dots as well.
        params: The trained parameters, or their average.

    Returns:
        By the names of those modules that were called, in the model's order. Of an output of several tensors, the first
        floating one is looked at.

    Raises:
        ValueError: No module has such a name, or none of them was called; or the model is cut into stages.
    """
    if program.portion() is not None:
        raise ValueError("activations: each process has a stage of this model only; use ff.single or ff.accelerated")
    root = program.module()
    named = {name: module for name, module in root.named_modules() if name}
    names = chosen("module", named, modules)
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(_watching({name: named[name] for name in names}))
        if program.plan.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        program.evaluate(state, _of_the_first(batch, program.world), params=params)
    own = {name: _statistics(sums) for name, sums in seen.items() if sums}
    found: dict[str, Activation] = program.world.broadcast(own)
    if not found:
        raise ValueError(f"activations: {', '.join(names[:5])} give out no floating tensor in a forward pass")
    return found


def _of_the_first(batch: Any, world: World) -> list[Any]:
    """Give every process what the first has of a batch, once for each: batches are dealt out in turn."""
    parts = world.broadcast(as_it_came(as_batch(batch)) if world.main else None)
    return [part for part in parts for _ in range(world.size)]


@contextlib.contextmanager
def _watching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Add up the outputs of modules for the time of a block."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(functools.partial(_look, seen[name]))
            stack.callback(handle.remove)
        yield seen


def _look(sums: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    del module, inputs
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            sums.append(_sums(leaf.detach()))
            return


def _sums(tensor: Tensor) -> Tensor:
    """Give the number of elements, their sum, the sum of squares, the largest magnitude, and the number of zeros."""
    wide = torch.float64 if tensor.device.type != "mps" else torch.float32
    norm = torch.linalg.vector_norm(tensor, dtype=wide)
    largest = tensor.abs().amax()
    elements = torch.full((), tensor.numel(), dtype=wide, device=tensor.device)
    zeros = elements - torch.count_nonzero(tensor)
    return torch.stack([elements, tensor.sum(dtype=wide), norm * norm, largest.to(wide), zeros])


def _statistics(sums: list[Tensor]) -> Activation:
    columns = torch.stack(sums)
    elements, total, squares, _, zeros = columns.sum(0).tolist()
    largest = columns[:, 3].amax().item()
    return Activation(int(elements), total / elements, math.sqrt(squares / elements), largest, zeros / elements)


@checked
def activation_statistics(*, modules: str = "*", batch: Any = None, params: Params = "params") -> Observer:
    """Look at what modules give out: one forward pass more at each look.

    Args:
        modules: As in :func:`activations`.
        batch: What the model is run on; None for the batch of the step.
        params: As in :func:`activations`.

    Returns:
        For :func:`~forgather_fn.stages.every` and the like; its results are ``activation_rms/<module>``,
        ``activation_max/<module>`` and ``activation_zeros/<module>``.
    """

    def observe(tick: Tick) -> Mapping[str, float]:
        given = tick.batch if batch is None else batch
        found = activations(tick.run.program, tick.state, given, modules=modules, params=params)
        return {
            f"activation_{label}/{name}": value
            for name, one in found.items()
            for label, value in {"rms": one.rms, "max": one.largest, "zeros": one.zeros}.items()
        }

    return Observer(observe)
