"""Several models and optimizers in one state: a program of programs, whose step is the user's composition of theirs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
from torch import nn

from forgather_fn import joining
from forgather_fn.batch import as_batch
from forgather_fn.data import Stream
from forgather_fn.describe import describe
from forgather_fn.dispatch import opened
from forgather_fn.flat import listed
from forgather_fn.joining import members, seed_of
from forgather_fn.loop import open_steps
from forgather_fn.optim import Optimizer
from forgather_fn.plan import Plan
from forgather_fn.program import Metrics, Program, public
from forgather_fn.random import key, seeded
from forgather_fn.state import Ownership, Params, TrainState
from forgather_fn.step import following
from forgather_fn.strategy.single import single

Programs = Mapping[str, Program]
States = Mapping[str, TrainState]


class JointStep(Protocol):
    """Make one step of several models."""

    def __call__(self, programs: Programs, states: dict[str, TrainState], batch: Any, /) -> tuple[States, Metrics]:
        """Step some of the members, each by its program, and give the states of all of them, and metrics.

        It is a function of what it is given: what it draws from torch's generators is derived from the joint state.
        """
        ...


class JointEvaluate(Protocol):
    """Measure several models together."""

    def __call__(self, programs: Programs, states: States, data: Any, /) -> Mapping[str, float]:
        """Give named results."""
        ...


@attrs.frozen(eq=False)
class OfMembers:
    """In the plan of a joint program, what each member has of its own: it prints as theirs, and is not called.

    Attributes:
        names: Of the members.
        description: How it prints.
    """

    names: tuple[str, ...]
    description: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"a joint program has no model, loss or schedule of its own; those of its members are called through "
            f"program.members, {listed(self.names)}, on ff.members(state)"
        )


_OURS: Final = ("loss", "transforms", "average", "precision", "on_nonfinite", "init", "microbatches")


def joined(members: Mapping[str, Plan | Program], step: JointStep, *, evaluate: JointEvaluate | None = None) -> Program:
    """Make one program of several, whose state has the state of each: a GAN, an actor and its critic.

    The program goes through loops, observers and checkpoints as any other. ``ff.members(state)`` gives the states of
    the members. Names in the joint state begin with the member's: ``critic.0.weight``. Each member has a seed that is
    derived from the joint one, and counts its own steps: its schedule and keys read that number.

    The joint state is consumed when a step ends, or when it fails after it has updated a member: that update is made. A
    step that fails before leaves it readable. ``Plan(donate=False)`` in any member keeps it in every case.

    Args:
        members: A plan for each, trained on one device, or its program.
        step: ``(programs, states, batch) -> (states, metrics)``.
        evaluate: ``(programs, states, data) -> results``, for ``program.evaluate``.

    Returns:
        The program. ``gradients``, ``update`` and ``apply`` are only of ``program.members``, their programs.

    Raises:
        ValueError: A name is not an identifier, or the members are on several devices or run by several processes.
    """
    if not isinstance(members, Mapping) or not callable(step):
        raise ValueError(
            "joined takes members by name, and a function (programs, states, batch) -> (states, metrics); got "
            f"{type(members).__name__} and {type(step).__name__}"
        )
    programs = {name: single(member) if isinstance(member, Plan) else member for name, member in members.items()}
    _check(programs)
    plan = _plan(programs, step)
    modules: list[nn.ModuleDict] = []

    def init(seed: int = 0) -> TrainState:
        states = {name: program.init(seed_of(seed, name)) for name, program in programs.items()}
        if not modules:
            modules.append(nn.ModuleDict({name: program.module() for name, program in programs.items()}))
        return TrainState(step=0, samples=0, seed=seed, arrays=joining.joined(states))

    def module() -> nn.Module:
        if not modules:
            raise ValueError("this program has no model yet: call program.init(seed) before anything else")
        return modules[0]

    def restore(path: str | Path, *, allow: Collection[str] = (), without: Collection[str] = ()) -> TrainState:
        from forgather_fn.checkpoint.restoring import restored  # when used: it reads safetensors

        if isinstance(without, str) or set(without) - {"optimizer", "progress"}:
            raise ValueError(f"restore: without={without!r}: a joint program takes only 'optimizer' and 'progress'")
        # What the members have counted is in the joint state's controls.
        left = {*without, "controls"} if "progress" in without else without
        return restored(plan, init, plan_world, lambda: None, path, allow, left)

    def take(state: TrainState, batch: Any, /, *, wants: frozenset[str] = frozenset()) -> tuple[TrainState, Metrics]:
        return _step(programs, step, plan, state if plan.donate else state.copy(), batch, wants)

    def measure(
        state: TrainState, data: Any, /, *, params: Params = "params", metrics: Sequence[Any] = ()
    ) -> dict[str, float]:
        if evaluate is None or params != "params" or metrics:
            raise ValueError(
                "a joint program is evaluated by the function that it was made with: ff.joined(members, step, "
                "evaluate=...), which chooses the parameters and the metrics by itself"
            )
        return dict(evaluate(programs, joining.members(state), data))

    def export(state: TrainState, /, *, params: Params = "params") -> nn.Module:
        states = joining.members(state)
        return nn.ModuleDict({name: one.export(states[name], params=params) for name, one in programs.items()})

    def batches(state: TrainState, data: Iterable[Any] | Stream, /) -> Any:
        return opened(data, state, None)

    plan_world = next(iter(programs.values())).world
    refused: Any = plan.loss
    public(init=init, restore=restore, step=take, evaluate=measure, export=export)
    return Program(
        plan=plan,
        init=init,
        restore=restore,
        module=module,
        step=take,
        gradients=refused,
        update=refused,
        evaluate=measure,
        apply=refused,
        export=export,
        carry=_carry,
        batches=batches,
        open_steps=open_steps,
        world=plan_world,
        members=programs,
    )


def _step(
    programs: Programs, step: JointStep, plan: Plan, state: TrainState, batch: Any, wants: frozenset[str]
) -> tuple[TrainState, Metrics]:
    batch = as_batch(batch)
    before = joining.members(state)
    state.settle()  # whoever reads the whole in the background knows nothing of its members
    if wants:
        programs = {name: _wanting(program, wants) for name, program in programs.items()}
    try:
        with seeded(key(state.seed, state.step, "joined"), plan.device):
            after, metrics = _result(step(programs, dict(before), batch.data))
        _check_states(before, after)
    except BaseException:
        updated = [name for name, member in before.items() if member.consumed]
        if updated:
            state.consume(f"step {state.step}, which failed when it had updated {listed(updated)}")
        raise
    ordered = {name: after[name] for name in before}
    arrays = joining.joined(ordered, state.read())
    state.consume(f"step {state.step}")
    return attrs.evolve(following(state, arrays, batch.samples), cursor=batch.cursor), metrics


def _wanting(program: Program, wants: frozenset[str]) -> Program:
    def step(state: TrainState, batch: Any, /, *, wants: frozenset[str] = wants) -> tuple[TrainState, Metrics]:
        return program.step(state, batch, wants=wants)

    return attrs.evolve(program, step=step)


def _check_states(before: States, after: States) -> None:
    if not isinstance(after, Mapping) or set(after) != set(before):
        found = listed(list(after)) if isinstance(after, Mapping) else type(after).__name__
        raise ValueError(f"joined: the step must give the states of {listed(list(before))}, and gave {found}")
    stale = [name for name, member in after.items() if member.consumed]
    if stale:
        raise ValueError(
            f"joined: the step gave the state of {listed(stale)} from before it was updated; give the one that the "
            "member's step returned: states[name], metrics = programs[name].step(states[name], batch)"
        )


def _result(found: Any) -> tuple[States, Metrics]:
    """Take apart what a joint step gives."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        return found
    raise ValueError(
        f"joined: the step must give (states, metrics), both by name, and gave a {type(found).__name__}; "
        "return states, metrics"
    )


def _check(programs: Programs) -> None:
    if not programs:
        raise ValueError("joined: there are no members")
    for name, program in programs.items():
        if not isinstance(program, Program):
            raise ValueError(f"joined: {name!r} is a {type(program).__name__}; a member is a plan, or a program of one")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"joined: a member's name begins those of its tensors, and must be an identifier; got {name!r}"
            )
        if program.world.size > 1 or program.members:
            raise ValueError(f"joined: {name} is run by several processes, or joint itself; use plans or ff.single")
        if program.plan.controls:
            raise ValueError(
                f"joined: the schedule of {name}, {describe(program.plan.schedule)}, reacts to results, "
                "and those of a joint program are not of one member; use a schedule of the step"
            )
    devices = sorted({str(program.plan.device) for program in programs.values()})
    if len(devices) > 1:
        raise ValueError(f"joined: the members are on several devices, {', '.join(devices)}; a state is on one")


def _plan(programs: Programs, step: JointStep) -> Plan:
    """Make a plan that says what the members are."""
    told = {name: program.plan.describe() for name, program in programs.items()}

    def said(*fields: str) -> str:
        return "; ".join(
            f"{name}: {', '.join(f'{field}={text[field]}' for field in fields)}" for name, text in told.items()
        )

    def start(params: Any) -> dict[str, Any]:
        separate = joining.apart(params, tuple(programs))
        return {name: program.plan.optimizer.init(separate[name]) for name, program in programs.items()}

    def of_members(*fields: str) -> Any:
        return OfMembers(tuple(programs), said(*fields))

    refused = of_members("optimizer")
    return Plan(
        model=of_members("model"),
        loss=OfMembers(tuple(programs), f"{describe(step)}; {said(*_OURS)}"),
        optimizer=Optimizer(start, refused, refused, description=said("optimizer"), compiles=False),
        schedule=of_members("schedule"),
        on_nonfinite="skip" if any(one.plan.on_nonfinite == "skip" for one in programs.values()) else "raise",
        device=next(iter(programs.values())).plan.device,
        donate=all(program.plan.donate for program in programs.values()),
    )


def _carry(
    old: Program, state: TrainState, new: Program, /, *, dropping: Collection[str], without: Collection[str], tell: Any
) -> TrainState:
    """Carry the members of a joint state into those of another, by name."""
    ours, theirs = old.members, new.members
    if ours.keys() != theirs.keys():
        raise ValueError("convert: the members of a joint program are carried to those of another with the same names")
    odd = [pattern for pattern in dropping if pattern.partition(".")[0] not in ours]
    if odd:
        raise ValueError(f"convert: dropping={odd[0]!r} begins with no member's name; they are {listed(list(ours))}")
    new.init(state.seed)
    states = {
        name: ours[name].convert(
            member,
            theirs[name],
            dropping=[p.removeprefix(f"{name}.") for p in dropping if p.startswith(f"{name}.")],
            without=without,
            tell=tell,
        )
        for name, member in members(state).items()
    }
    arrays = joining.joined(states)
    if "progress" in without:
        return TrainState(step=0, samples=0, seed=state.seed, arrays=arrays)
    return attrs.evolve(state, arrays=arrays, ownership=Ownership())
