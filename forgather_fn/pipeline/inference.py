"""What a pipeline does with a model besides training it: measure it, call it, take it out."""

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forgather_fn.batch import as_batch
from forgather_fn.binding import unbind
from forgather_fn.built import Built
from forgather_fn.data.batch import digest
from forgather_fn.evaluation import chosen, evaluating, purpose
from forgather_fn.metrics import Measure
from forgather_fn.pipeline.freeing import Freed, filled
from forgather_fn.pipeline.machine import Machine, first_sample, signature
from forgather_fn.pipeline.wire import forward_only
from forgather_fn.random import key, reseed, seeded
from forgather_fn.reading import Pass, check_alike
from forgather_fn.state import Params, TrainState, raise_if_nonfinite
from forgather_fn.tally import Tally, combined, meter
from forgather_fn.world import World


def evaluate(
    machine: Machine, built: Built, state: TrainState, data: Any, params: Params, metrics: Sequence[Measure] = ()
) -> dict[str, float]:
    """Measure every sample once, by the loss and by metrics, on every process; of any schedule, any batches.

    As many batches as there are stages are under way at a time.

    Raises:
        ValueError: The data gave no batch, a metric cannot be measured, or the plan keeps no average.
        NonFiniteError: A step before was not finite.
    """
    raise_if_nonfinite(state)
    measuring = meter(built.plan.loss, metrics, built.device)
    tally = Tally(measuring)
    line = machine.line
    taken = Pass(data, World(rank=line.number, size=line.pipelines), built.device)
    with (
        evaluating(built, state, params),
        seeded(key(state.seed, state.step, "evaluate"), built.device),
        line.world.telling(),
    ):
        for microbatches in _windows(machine, iter(taken)):

            def run(
                stage: int, number: int, hidden: Tensor | None, microbatches: Mapping[int, Any] = microbatches
            ) -> Any:
                path = (number, "evaluate", stage) if stage else (number, "evaluate")
                reseed(key(state.seed, state.step, *path), built.device)
                result = machine.run(stage, microbatches[number], hidden)
                if stage < line.stages - 1:
                    return result
                with built.autocast():
                    return measuring(result, microbatches[number])

            for number, reading in forward_only(line, list(microbatches), run, built.device).items():
                tally.take(number, reading)
    own = taken.read(purpose(state, params, metrics)), tally.found()
    reads, found = zip(*line.world.gather(own), strict=True)
    check_alike(reads)
    return combined(found, measuring.aggregates)


def _windows(machine: Machine, batches: Iterator[tuple[int, Any]]) -> Iterator[dict[int, Any]]:
    """Give as many batches at a time as there are stages, by number, while any pipeline has some; collective.

    Raises:
        ValueError: The processes of a pipeline have other batches. The content of the first ones is compared too.
    """
    line, built = machine.line, machine.built

    def read(first: bool) -> tuple[dict[int, Any], Any]:
        window = {number: as_batch(item).data for number, item in itertools.islice(batches, line.stages)}
        return window, ([*map(signature, window.values())], digest(window)[:16] if first else "")

    for first in itertools.chain([True], itertools.repeat(False)):
        window, everywhere = line.alike(lambda: "batches of an evaluation", functools.partial(read, first))
        if everywhere and not window:
            return
        if machine.flow is None:  # a pipeline may have no batch to prove it by, but the first one has
            example = line.world.broadcast(first_sample(next(iter(window.values()))) if line.world.main else None)
            line.world.each(functools.partial(machine.prove, built.place(example)))
        yield {number: built.place(microbatch) for number, microbatch in window.items()}


def apply(
    machine: Machine, built: Built, state: TrainState, inputs: tuple[Any, ...], named: dict[str, Any], params: Params
) -> Any:
    """Call the model on inputs in evaluation mode, and give its outputs on every process."""
    line = machine.line
    args, kwargs = built.place(inputs), built.place(named)
    line.alike(lambda: "inputs of apply", lambda: (None, (signature((args, kwargs)), digest((args, kwargs))[:16])))
    with (
        evaluating(built, state, params),
        seeded(key(state.seed, state.step, "apply"), built.device),
        line.world.telling(),
    ):
        call = functools.partial(built.module, *args, **kwargs)
        line.world.each(lambda: machine.prove_by(call))

        def run(stage: int, number: int, hidden: Tensor | None) -> Any:
            with built.autocast():
                return machine.stages[stage].run(hidden, call)

        results = forward_only(line, [0], run, built.device)
    told = line.world.gather(results.get(0))
    return told[line.number * line.ranks + line.rank_of(line.stages - 1)]


def export(machine: Machine, built: Built, state: TrainState, params: Params) -> nn.Module:
    """Give the whole module, with the parameters of all stages, on every process."""
    line, arrays = machine.line, state.read()
    built.bound(arrays)
    used = chosen(built.plan, arrays, params)
    whole = gathered(machine, {**used, **arrays.frozen})
    kept = gathered(machine, {name: t for name, t in arrays.buffers.items() if machine.keeper(name) in line.own})
    if used is not arrays.params:
        built.binding.bind(used, arrays.frozen, arrays.buffers)
    try:
        exported = copy.deepcopy(built.module)
    finally:
        built.bound(arrays)
    built.binding.restore_ties(exported)
    unbind(exported)
    made: dict[str, nn.Parameter] = {}

    def value(place: str, instead: Freed) -> nn.Parameter:
        name = machine.assignment.places[place]
        if name not in made:
            made[name] = nn.Parameter(whole[name].to(built.device), instead.requires_grad)
        return made[name]

    filled(exported, value)
    held = {name: tensor.to(built.device) for name, tensor in kept.items()}
    for place, name in built.binding.buffer_places(held).items():
        prefix, _, attribute = place.rpartition(".")
        exported.get_submodule(prefix)._buffers[attribute] = held[name]
    return exported


def gathered(machine: Machine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every process the tensors of all stages, in the CPU's memory."""
    line = machine.line
    own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    told: dict[str, Tensor] = {}
    for found in line.world.gather(own if line.number == 0 else {}):
        told |= {name: tensor for name, tensor in found.items() if name not in told}
    return told


def agreed(tensors: Mapping[str, Tensor], world: World) -> None:
    """Take the values of the first process, on which a model may have been built with other random numbers."""
    from torch import distributed

    if world.size > 1:
        with world.explained(), torch.no_grad():
            for tensor in tensors.values():
                dense = tensor.detach().contiguous()
                distributed.broadcast(dense, group=world.group, group_src=0)
                if dense.data_ptr() != tensor.data_ptr():
                    tensor.copy_(dense)
