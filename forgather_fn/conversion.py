"""Carrying a state into another program: one model, whose parameters are grouped, trained, or stored in another way."""

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import describe
from forgather_fn.flat import Flat, filled, layout_of, listed
from forgather_fn.model import buffer_slots
from forgather_fn.program import Program, itself
from forgather_fn.state import COUNTERS, RESTARTABLE, Arrays, Ownership, TrainState, as_state, check_names
from forgather_fn.tree import copied, rebuilt, walk

logger = logging.getLogger(__name__)


@attrs.frozen
class Conversion:
    """What became of each tensor of a state that was carried into another program, by its path.

    Attributes:
        carried: Has the values of the state that was given.
        fresh: Is as the other program begins with it.
        dropped: Was in the state, and has no place in the other program's.
    """

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = (f"{what}: {listed(names, 8)}" for what, names in attrs.asdict(self).items() if names)
        return "\n".join(lines)


def converted(
    old: Program,
    state: TrainState,
    new: Program,
    /,
    *,
    dropping: Collection[str],
    without: Collection[str],
    tell: Callable[[Conversion], object] | None,
) -> TrainState:
    """Make the state of another program from a state; see :meth:`~forgather_fn.program.Program.convert`."""
    _check(old, new, without)
    arrays = as_state(state).read()
    fresh = new.init(state.seed)
    carrying = _Carrying(dropping=frozenset(dropping))
    made = _arrays(old, new, arrays, fresh.read(), carrying, without)
    account = carrying.account()
    logger.info("a state was converted:\n%s", account)
    if tell is not None:
        tell(account)
    if "progress" in without:
        return attrs.evolve(fresh, arrays=made)
    return attrs.evolve(state, arrays=made, ownership=Ownership())


def _check(old: Program, new: Program, without: Collection[str]) -> None:
    check_names("convert: without", without, RESTARTABLE)
    for program in (old, new):
        if program.whole is not itself:
            raise ValueError(
                "convert: a process has only its shards of this program's states, and others have the rest; save the "
                "state, and restore it with the other program, which may be of any strategy"
            )


def _arrays(
    old: Program, new: Program, given: Arrays, fresh: Arrays, carrying: "_Carrying", without: Collection[str]
) -> Arrays:
    """Fill the storage of a fresh state; frozen parameters, which other states may share, are not written to."""
    if new.portion() is not None or old.portion() is not None:
        raise ValueError(
            "convert: a process has only its stages of a pipeline; save the state, and restore it with the other "
            "program, which may be of any strategy"
        )
    frozen = carrying.model(given, fresh)
    plan, params = new.plan, fresh.params
    names = tuple(given.params), tuple(params)
    parts: dict[str, Any] = {"opt": plan.optimizer.init(params)}  # of the parameters as they are now
    parts["transforms"] = tuple(transform.init(params) for transform in plan.transforms)
    if "optimizer" not in without:
        known = describe(old.plan.optimizer) == describe(plan.optimizer)
        parts["opt"] = carrying.tree(given.opt, parts["opt"], "opt", names, adopt=known)
    if "transforms" not in without:
        parts["transforms"] = tuple(
            carrying.tree(given.transforms[i], mine, f"transforms/{i}", names)
            if _kind(old.plan.transforms, i) == _kind(plan.transforms, i)
            else mine
            for i, mine in enumerate(parts["transforms"])
        )
    for name in ("controls", "loss_scale"):
        mine = getattr(fresh, name)
        parts[name] = mine if name in without else carrying.tree(getattr(given, name), mine, name, names)
    if fresh.ema is not None:
        fresh.ema.assign(params)
        if given.ema is not None and "ema" not in without:
            carrying.tree(given.ema, fresh.ema, "ema", names)
    if "progress" not in without:
        for name in COUNTERS:
            getattr(fresh, name).copy_(getattr(given, name))
    buffers = carrying.buffers(given.buffers, fresh.buffers, old, new)
    made = attrs.evolve(fresh, frozen=frozen, buffers=buffers, **parts)
    carrying.note(given, made)
    return made


def _kind(parts: tuple[Any, ...], number: int) -> str | None:
    """Name the function that made a part of a plan, whatever its arguments were."""
    return describe(parts[number]).partition("(")[0] if number < len(parts) else None


Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The parameters that a tensor with one element for each is about, on either side."""


@attrs.define(eq=False)
class _Carrying:
    """Carries values over, and notes which."""

    dropping: frozenset[str]
    carried: set[str] = attrs.field(factory=set)
    had: tuple[str, ...] = ()
    has: tuple[str, ...] = ()

    def account(self) -> Conversion:
        """Say what became of everything."""
        fresh = tuple(path for path in self.has if path not in self.carried)
        gone = tuple(path for path in self.had if path not in self.carried)
        return Conversion(tuple(path for path in self.has if path in self.carried), fresh, gone)

    def note(self, given: Arrays, made: Arrays) -> None:
        """Note what the states have, apart from what every state has."""
        self.had, self.has = tuple(_paths(given)), tuple(_paths(made))

    def model(self, given: Arrays, fresh: Arrays) -> dict[str, Tensor]:
        """Carry the parameters, trained or not; give those that are not trained.

        Raises:
            ValueError: One has no place, or another shape, and is not dropped by name.
        """
        theirs, mine = {**given.params, **given.frozen}, {**fresh.params, **fresh.frozen}
        dropped = {name for name in theirs if any(fnmatchcase(name, pattern) for pattern in self.dropping)}
        for pattern in self.dropping:
            if not any(fnmatchcase(name, pattern) for name in theirs):
                raise ValueError(
                    f"convert: dropping={pattern!r} matches no parameter; there are {_near(pattern, theirs)}"
                )
        _check_places(theirs, mine, dropped)
        frozen = dict(fresh.frozen)
        for name in (name for name in theirs if name in mine and name not in dropped):
            self.carried.add(f"params/{name}")
            if name in frozen:
                shared = name in given.frozen and _alike(theirs[name], frozen[name])
                frozen[name] = theirs[name] if shared else torch.empty_like(frozen[name]).copy_(theirs[name])
            else:
                fresh.params[name].copy_(theirs[name])
        return frozen

    def buffers(self, given: Flat, fresh: Flat, old: Program, new: Program) -> Flat:
        """Carry the module's buffers by name, as forward passes have left them: resized, made, or removed."""
        before, places = _buffer_places(old), _buffer_places(new)
        values = {name: held for name, held in given.items() if name in places}
        self.carried.update(f"buffers/{name}" for name in values)
        values |= {name: held for name, held in fresh.items() if name not in before}
        values = {name: held.to(fresh[name].dtype) if name in fresh else held for name, held in values.items()}
        if {n: held.shape for n, held in values.items()} == {n: held.shape for n, held in fresh.items()}:
            for name, mine in fresh.items():
                mine.copy_(values[name])
            return fresh
        return filled(layout_of(values), values, new.plan.device)

    def tree(self, given: Any, fresh: Any, path: str, names: Names, adopt: bool = False) -> Any:
        """Carry a tree, where both have a leaf of the same path and shape; flat storage is written to.

        Args:
            given: Of the state.
            fresh: As the other program begins.
            path: Of both.
            names: Of the parameters that a tensor with one element for each is about.
            adopt: Whether mappings are taken that the fresh tree does not have yet.
        """
        if isinstance(fresh, Flat):
            if isinstance(given, Mapping):
                self._by_name(given, fresh, path)
            return fresh
        if isinstance(fresh, Mapping):
            return self._mapping(given, fresh, path, names, adopt) if isinstance(given, Mapping) else fresh
        if isinstance(fresh, tuple | list):
            fits = isinstance(given, tuple | list) and len(given) == len(fresh)
            pairs = enumerate(zip(given, fresh, strict=True)) if fits else ()
            return rebuilt(fresh, [self.tree(o, n, f"{path}/{i}", names) for i, (o, n) in pairs]) if fits else fresh
        if isinstance(fresh, Tensor):
            return self._tensor(given, fresh, path, names) if isinstance(given, Tensor) else fresh
        if type(given) is type(fresh):
            self.carried.add(path)
            return given
        return fresh

    def _mapping(
        self, given: Mapping[str, Any], fresh: Mapping[str, Any], path: str, names: Names, adopt: bool
    ) -> Mapping[str, Any]:
        # A counter by parameter is about those that the slots beside it have.
        slots = [(given[name], held) for name, held in fresh.items() if isinstance(held, Flat) and name in given]
        names = (tuple(slots[0][0]), tuple(slots[0][1])) if slots else names
        merged = {
            name: self.tree(given[name], held, f"{path}/{name}", names, adopt) if name in given else held
            for name, held in fresh.items()
        }
        if not adopt:
            return merged
        for slot, values in given.items():
            if slot not in fresh and isinstance(values, Mapping):
                gone = {n for n in values if n in names[0] and (n not in names[1] or f"params/{n}" not in self.carried)}
                merged[slot] = copied({name: value for name, value in values.items() if name not in gone})
                self.carried.update(leaf for leaf, _ in walk(merged[slot], f"{path}/{slot}"))
        return merged

    def _by_name(self, given: Mapping[str, Tensor], fresh: Flat, path: str) -> None:
        for name, mine in fresh.items():
            if name in given and given[name].shape == mine.shape and f"params/{name}" in self.carried:
                mine.copy_(given[name])
                self.carried.add(f"{path}/{name}")

    def _tensor(self, given: Tensor, fresh: Tensor, path: str, names: Names) -> Tensor:
        olds, news = names
        if given.shape == (len(olds),) and fresh.shape == (len(news),):
            new = fresh.clone()
            for i, name in enumerate(news):
                if name in olds and f"params/{name}" in self.carried:
                    new[i] = given[olds.index(name)]
            self.carried.add(path)
            return new
        if given.shape != fresh.shape:
            return fresh
        self.carried.add(path)
        return fresh.clone().copy_(given)


def _check_places(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], dropped: Collection[str]) -> None:
    for name, tensor in theirs.items():
        if name in dropped:
            continue
        if name not in mine:
            raise ValueError(
                f"convert: the other program has no parameter {name!r}; it has {_near(name, mine)}. To leave it behind "
                f"on purpose: convert(..., dropping=[{name!r}])"
            )
        if mine[name].shape != tensor.shape:
            raise ValueError(
                f"convert: {name} is {tuple(tensor.shape)} in the state, and {tuple(mine[name].shape)} in the other "
                f"program. To begin with the other's on purpose: convert(..., dropping=[{name!r}])"
            )


def _near(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
    return listed([*close, *sorted(set(known) - set(close))])


def _buffer_places(program: Program) -> set[str]:
    return {slot.name for slot in buffer_slots(program.module())}


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device, one.stride()) == (other.dtype, other.device, other.stride())


def _paths(arrays: Arrays) -> Iterator[str]:
    yield from (f"params/{name}" for name in (*arrays.params, *arrays.frozen))
    for part in ("buffers", "opt", "transforms", "ema", "controls", "loss_scale"):
        yield from (path for path, leaf in walk(getattr(arrays, part), part) if leaf is not None)
