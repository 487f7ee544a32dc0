"""What crosses a cut: found by running the model once and following where each tensor comes from.

Every operation is seen. A tensor is *of* the stage in which a parameter, or what a stage before has sent, went into it;
masks, positions and whatever else is made of the batch alone is of none, since each stage makes it again. A cut is good
if, of all that the stages before have made, the next one reads the hidden state and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.model import buffer_slots, evaluation_mode
from forgather_fn.pipeline.cuts import Assignment, Cut, SplitError
from forgather_fn.pipeline.forms import Form, form_of
from forgather_fn.pipeline.freeing import freed
from forgather_fn.pipeline.trace import Following, Trace, owners_of
from forgather_fn.random import seeded


@attrs.frozen(eq=False)
class Crossing:
    """Where a hidden state is taken.

    Attributes:
        cut: At which module.
        form: Of the module's output at its end, of its ``(args, kwargs)`` at its beginning.
        written: Whether the next stage writes into the hidden state, which is a leaf of autograd there.
    """

    cut: Cut
    form: Form
    written: bool = False


@attrs.frozen(eq=False)
class Flow:
    """How a model runs through its stages.

    Attributes:
        assignment: Which stages use each tensor.
        crossings: For each cut, where the hidden state is taken. The beginning of a module that is given the output of
            another as it is, is the end of that.
        skipped: For each stage, modules that need not be run before it begins, since they only lead from one hidden
            state to the next; by name, with the form of their outputs.
        reused: Stages that use a parameter several times.
    """

    assignment: Assignment
    crossings: tuple[Crossing, ...]
    skipped: tuple[Mapping[str, Form], ...]
    reused: frozenset[int] = frozenset()


@attrs.define(eq=False)
class _Call:
    """One call of a module."""

    name: str
    ended: int = -1
    given: tuple[Form, Tensor] | None = None
    kept: bool = False


def probe(model: nn.Module, cuts: Sequence[Cut], call: Callable[[], Any]) -> Flow:
    """Run a model once, in evaluation mode, and find how it runs through the stages of some cuts.

    Args:
        model: Left as it was. Its parameters need no values: those of other stages may be stand-ins.
        cuts: In order.
        call: Calls the model on an example; one sample does.

    Raises:
        SplitError: More than the hidden state crosses a cut; a module at a cut is not called once, in the order of the
            cuts, or gives no hidden state; or a stage has no parameter.
    """
    named = {child: name for name, child in model.named_modules()}
    slots = buffer_slots(model)
    buffers = {slot.name: slot.tensor for slot in slots if slot.tensor is not None and slot.tensor.numel()}
    trace = Trace(owners_of(stand_ins(model), buffers))
    calls: list[_Call] = []
    passed: list[tuple[Crossing, _Call | None]] = []
    before = [(slot, None if slot.tensor is None else slot.tensor.clone()) for slot in slots]
    modes = evaluation_mode(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(seeded(0, torch.device("cpu")))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_watching(named, trace, calls))
            stack.enter_context(_cutting(model, cuts, trace, passed, calls))
            stack.enter_context(Following(trace))
            call()
    finally:
        modes.restore()
        with torch.no_grad():
            for slot, value in before:
                if slot.tensor is not None and value is not None and slot.tensor.shape == value.shape:
                    slot.tensor.copy_(value)
    _check_passed(cuts, [crossing.cut for crossing, _ in passed])
    assignment = _assigned(cuts, trace, {slot.name: slot.name.rpartition(".")[0] for slot in slots}, calls)
    crossings = tuple(_crossings(passed, trace, calls))
    reused = frozenset(stage for (stage, _), times in trace.uses.items() if times > 1)
    return Flow(assignment, crossings, tuple(_skipped(model, crossings, calls)), reused)


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Give every parameter by name, and what stands in for those that were freed."""
    found: dict[str, Tensor] = {}
    for prefix, child in model.named_modules():
        stands = {name: instead.stand for name, instead in freed(child).items()}
        for name, tensor in (*child._parameters.items(), *stands.items()):
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


@contextmanager
def _watching(named: Mapping[nn.Module, str], trace: Trace, calls: list[_Call]) -> Iterator[None]:
    """Note which module runs, and the form of what those give that lead from one hidden state to the next."""
    running: list[tuple[_Call, Tensor | None]] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken = form_of((args, kwargs))
        trace.modules.append(named[module])
        call = _Call(named[module])
        calls.append(call)
        running.append((call, taken[1] if taken else None))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, taken = running.pop()
        trace.modules.pop()
        call.ended = trace.stage
        call.given = form_of(output)
        if call.given and taken is not None:
            call.kept = (call.given[1].shape, call.given[1].dtype) == (taken.shape, taken.dtype)

    with ExitStack() as stack:
        for child in named:
            stack.callback(child.register_forward_pre_hook(begin, with_kwargs=True, prepend=True).remove)
            stack.callback(child.register_forward_hook(end, with_kwargs=True).remove)
        yield


@contextmanager
def _cutting(
    model: nn.Module, cuts: Sequence[Cut], trace: Trace, passed: list[tuple[Crossing, _Call | None]], calls: list[_Call]
) -> Iterator[None]:
    """At each cut, go on to the next stage with a hidden state of that stage."""

    def crossing(cut: Cut, value: Any) -> Any:
        found = form_of(value)
        if found is None:
            raise SplitError(f"split_spec: there is no hidden state at {cut}: no floating tensor is passed there")
        form, hidden = found
        origin = trace.origins.get(hidden.untyped_storage()._cdata)
        if origin is None or origin.stage != trace.stage or origin.module is None:
            raise SplitError(f"split_spec: at {cut} the stage before it has done nothing; its cuts lie side by side")
        fresh = hidden.clone()
        passed.append((Crossing(cut, form), _giver(cut, hidden, calls)))
        trace.cross(fresh)
        return form.holding(fresh, within=value)

    with ExitStack() as stack:
        for cut in cuts:
            module = model.get_submodule(cut.name)
            if cut.side == "end":

                def at_end(module: nn.Module, args: Any, output: Any, cut: Cut = cut) -> Any:
                    return crossing(cut, output)

                stack.callback(module.register_forward_hook(at_end).remove)
            else:

                def at_beginning(module: nn.Module, args: Any, kwargs: Any, cut: Cut = cut) -> Any:
                    return crossing(cut, (args, kwargs))

                stack.callback(module.register_forward_pre_hook(at_beginning, with_kwargs=True).remove)
        yield


def _giver(cut: Cut, hidden: Tensor, calls: Sequence[_Call]) -> _Call | None:
    """Find the call that gave what a module is given at its beginning, as it is."""
    ended = [call for call in calls if call.ended >= 0 and call.given is not None and call.given[1] is hidden]
    return ended[-1] if ended and cut.side == "beginning" else None


def _crossings(
    passed: Sequence[tuple[Crossing, _Call | None]], trace: Trace, calls: Sequence[_Call]
) -> Iterator[Crossing]:
    """Take the beginning of a module that is given what another gave, for the end of that, if it is called once.

    What lies before a module's beginning is run again where the module is recomputed for its gradient; a module's end
    is not.
    """
    names = [call.name for call in calls]
    for stage, (crossing, giver) in enumerate(passed, 1):
        written = stage in trace.written
        if giver is not None and giver.given is not None and names.count(giver.name) == 1:
            yield Crossing(Cut(giver.name, "end"), giver.given[0], written)
        else:
            yield attrs.evolve(crossing, written=written)


def _check_passed(cuts: Sequence[Cut], order: Sequence[Cut]) -> None:
    for cut in cuts:
        if order.count(cut) != 1:
            times = f"{order.count(cut)} times" if cut in order else "not at all"
            raise SplitError(f"split_spec: {cut} was passed {times} in one run of the model; a cut is passed once")
    if list(order) != list(cuts):
        raise SplitError(
            f"split_spec: the model runs its modules in another order than they were registered: {cuts[0]} comes "
            f"{order.index(cuts[0]) + 1}. of {len(order)} cuts; write the stages by hand: pipeline.Stages"
        )


def _assigned(cuts: Sequence[Cut], trace: Trace, slots: Mapping[str, str], calls: Sequence[_Call]) -> Assignment:
    """Tell which stages use what.

    Buffers that are not read in evaluation mode (how many batches there were) are of the stage in which their module
    ends.

    Args:
        cuts: In order.
        trace: Of the run.
        slots: Every place for a buffer, with the module that it is of.
        calls: Of modules, in order.
    """
    owners = [owner for held in trace.owners.values() for owner in held]
    params = {owner.name: frozenset(owner.stages) for owner in owners if not owner.buffer}
    for stage in range(len(cuts) + 1):
        if not any(stage in used for used in params.values()):
            raise SplitError(
                f"split_spec: stage {stage} of {len(cuts) + 1} has no parameter; its cuts are among "
                f"{', '.join(map(str, cuts))}"
            )
    ended = {call.name: frozenset({call.ended}) for call in calls}
    buffers = {name: ended[module] for name, module in slots.items() if module in ended}
    buffers |= {owner.name: frozenset(owner.stages) for owner in owners if owner.buffer and owner.stages}
    return Assignment(tuple(cuts), params, buffers)


def _skipped(model: nn.Module, crossings: Sequence[Crossing], calls: Sequence[_Call]) -> Iterator[Mapping[str, Form]]:
    """For each stage, name the largest modules that end before it and lead from one hidden state to the next.

    One with parameters gives nothing that a later stage reads, as the run has shown; one without any may, and is run.
    """
    yield {}
    names = [call.name for call in calls]
    sizes = {name: sum(1 for _ in child.modules()) for name, child in model.named_modules()}
    params = list(stand_ins(model))
    for stage, crossing in enumerate(crossings, 1):
        found: dict[str, Form] = {}
        for call in sorted(calls, key=lambda call: -sizes[call.name]):
            leads = call.kept and 0 <= call.ended < stage and names.count(call.name) == 1
            inside = any(call.name.startswith(f"{name}.") for name in found)
            around = f"{crossing.cut.name}.".startswith(f"{call.name}.") or not call.name
            inside |= crossing.cut.side == "end" and call.name.startswith(f"{crossing.cut.name}.")
            if leads and not inside and not around and any(name.startswith(f"{call.name}.") for name in params):
                assert call.given is not None
                found[call.name] = call.given[0]
        yield found
