"""A program: what every strategy makes of a plan, from how its steps are run and which processes run them."""

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import attrs
from torch import Tensor, nn

from forgather_fn import evaluation
from forgather_fn.batch import as_batch
from forgather_fn.built import Built, own_gradients
from forgather_fn.conversion import converted
from forgather_fn.dispatch import compared, dispatched, opened
from forgather_fn.execution import Execution
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.loop import Data, open_steps
from forgather_fn.metrics import Measure
from forgather_fn.plan import Plan
from forgather_fn.portion import Portion
from forgather_fn.program import Metrics, Program, public
from forgather_fn.share import Share
from forgather_fn.signature import shown
from forgather_fn.state import Params, TrainState, as_state
from forgather_fn.strategy.storage import Agree, Storage, first_state, held_whole
from forgather_fn.turn import turn
from forgather_fn.world import ALONE, World, check_same


@attrs.frozen(eq=False)
class Inference:
    """How a program runs a model besides training it; see :class:`~forgather_fn.program.Program`.

    Attributes:
        evaluate: ``(built, state, data, params, metrics) -> numbers``.
        apply: ``(built, state, inputs, named, params) -> outputs``.
    """

    evaluate: Callable[[Built, TrainState, Any, Params, Sequence[Measure]], dict[str, float]]
    apply: Callable[[Built, TrainState, tuple[Any, ...], dict[str, Any], Params], Any]


@attrs.frozen(eq=False)
class Strategy:
    """Where strategies differ.

    Attributes:
        execution: How the steps of a built plan are run.
        world: The processes that run the program together.
        cut_over: The processes among which the model is cut, so that one alone cannot run it.
        share: Which microbatches of a step this one has, None for all.
        agree: Makes tensors of a first state the same on all processes, in place.
        dispatch: Whether the first process alone reads data, and sends the others theirs.
        storage: How states hold parameters; None for whole ones.
        inference: How the model is run besides; None for each batch on one process.
        portion: Which portion of a state this process has, when its model is built; None for all of it.
    """

    execution: Callable[[Built], Execution]
    world: World = ALONE
    cut_over: World = ALONE
    share: Share | None = None
    agree: Agree = lambda layout, tensors: None
    dispatch: bool = False
    storage: Storage | None = None
    inference: Inference | None = None
    portion: Callable[[], Portion | None] = lambda: None


def assembled(plan: Plan, strategy: Strategy) -> Program:
    """Make the program of a plan.

    The model is built, or bound, at the first ``init``; before that nothing of it is touched.

    Args:
        plan: The recipe. A module in it is bound by the program: its parameters become views of a state's storage.
        strategy: How its steps are run, and by which processes.
    """
    held: list[tuple[Built, Execution]] = []
    storage = strategy.storage or held_whole(strategy.agree)
    inference = strategy.inference or Inference(
        functools.partial(evaluation.evaluate, world=strategy.world, pace=storage.pace), evaluation.apply
    )

    def built() -> Built:
        return running()[0]

    def running() -> tuple[Built, Execution]:
        if not held:
            raise ValueError("this program has no model yet: call program.init(seed) before anything else")
        return held[0]

    def init(seed: int = 0) -> TrainState:
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise ValueError(f"init: seed must be an integer, got {shown(seed)}")
        seed = operator.index(seed)
        strategy.world.begin("an init")
        check_same(
            strategy.world.gather(f"seed {seed}"),
            "init: the processes of a run must be given the same seed, by which all of them draw, and were given:",
        )
        with turn():
            module = storage.prepare(plan, seed)
            machine = held[0][0] if held else storage.build(plan, module)
            state = first_state(machine, module, seed, storage)
            if not held:
                machine = attrs.evolve(machine, slots=frozenset(state.opt))
                held.append((machine, strategy.execution(machine)))
        return state

    def restore(path: str | Path, *, allow: Collection[str] = (), without: Collection[str] = ()) -> TrainState:
        from forgather_fn.checkpoint.restoring import restored  # when used: it reads safetensors

        strategy.world.begin("a load")
        with turn():
            return restored(plan, init, strategy.world, strategy.portion, path, allow, without, storage.rows)

    def step(state: TrainState, batch: Any, /, *, wants: frozenset[str] = frozenset()) -> tuple[TrainState, Metrics]:
        _, execution = running()
        state, batch = as_state(state), as_batch(batch)
        with turn():
            following, metrics = execution.step(state if plan.donate else state.copy(), batch, wants)
        return following if batch.cursor is None else _at(following, batch.cursor), metrics

    def gradients(state: TrainState, batch: Any, /) -> tuple[Gradients, Mapping[str, Any], Metrics]:
        _, execution = running()
        state, batch = as_state(state), as_batch(batch)
        with turn():
            taken, buffers, means = execution.gradients(state, batch)
            copied = taken.copy()
        return copied if batch.cursor is None else attrs.evolve(copied, cursor=batch.cursor), buffers, means

    def update(
        state: TrainState,
        gradients: Gradients | Mapping[str, Tensor],
        /,
        buffers: Mapping[str, Any] | None = None,
        *,
        batch: Any = None,
    ) -> tuple[TrainState, Metrics]:
        if not isinstance(buffers, Flat | None):
            raise ValueError(
                f"update: buffers are those that program.gradients gave, or None; got {type(buffers).__name__}"
            )
        machine, execution = running()
        state = as_state(state)
        machine.check(state.read())
        own = None if batch is None else as_batch(batch)
        if not isinstance(gradients, Gradients):
            taken = own_gradients(machine.binding.layout, gradients, own)
            taken = attrs.evolve(taken, spread=execution.spread)
        elif own is None:
            taken = gradients.copy()
        else:
            raise ValueError("update: these gradients know which batch they are of; leave batch out")
        with turn():
            given = state if plan.donate else state.copy()
            following, metrics = execution.advance(given, taken, buffers, {}, frozenset())
        return _at(following, taken.cursor), metrics

    def evaluate(
        state: TrainState, data: Any, /, *, params: Params = "params", metrics: Sequence[Measure] = ()
    ) -> dict[str, float]:
        strategy.world.begin("an evaluation")
        with turn():
            return inference.evaluate(built(), as_state(state), data, params, metrics)

    def apply(state: TrainState, /, *inputs: Any, params: Params = "params", **named: Any) -> Any:
        strategy.cut_over.begin("a call of apply")
        with turn():
            return inference.apply(built(), as_state(state), inputs, named, params)

    def export(state: TrainState, /, *, params: Params = "params") -> nn.Module:
        strategy.cut_over.begin("an export")
        with turn():
            return storage.export(built(), as_state(state), params)

    def batches(state: TrainState, data: Data, /) -> Iterator[Any]:
        if strategy.dispatch:
            assert strategy.share is not None
            return dispatched(strategy.world, strategy.share, state, data)
        return compared(strategy.world, state, opened(data, state, strategy.share))

    public(init=init, restore=restore, step=step, gradients=gradients, update=update)

    def check(state: TrainState, /) -> TrainState:
        if held:
            built().check(as_state(state).read())
        return state

    public(evaluate=evaluate, apply=apply, export=export)
    return Program(
        plan=plan,
        init=init,
        restore=restore,
        module=lambda: built().module,
        step=step,
        gradients=gradients,
        update=update,
        evaluate=evaluate,
        apply=apply,
        export=export,
        carry=converted,
        batches=batches,
        open_steps=open_steps,
        world=strategy.world,
        share=strategy.share,
        portion=strategy.portion,
        whole=storage.whole,
        check=check,
    )


def _at(state: TrainState, cursor: str | None) -> TrainState:
    """Note where the data goes on; most streams need no more than the number of samples."""
    return state if cursor is None else attrs.evolve(state, cursor=cursor)
