"""Torch's ``fully_shard`` (FSDP2) on the storage of a state: all that this package knows of its inside.

``fully_shard`` gathers a unit of the model (a block) before its forward and its backward pass, lets go of it after
them, and adds up its gradient so that each process has the sum of its own block of rows. It holds those blocks itself,
as the local tensors of distributed ones, and offers no way to say where in memory they lie. Here they are views of the
flat storage of a state, so that one kernel updates them all and nothing is copied in a step. That takes attributes that
are not public, as they are in one version of torch; any other is refused until somebody has looked.

Source: https://docs.pytorch.org/docs/2.13/distributed.fsdp.fully_shard.html, and the code of
``torch.distributed.fsdp._fully_shard``.
"""

import functools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Protocol

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.flat import Flat, listed
from forgather_fn.model import anatomy_of
from forgather_fn.shards import Shards
from forgather_fn.world import World

KNOWN: Final = ("2", "13")
"""The version of torch whose inside this file was written against."""


ORDERS: Final = 1048573
"""How many orders are told apart: a prime whose square, added up over processes, is exact in float64."""


def check_version(version: str) -> None:
    """Make sure that torch is the one whose inside is known here.

    Raises:
        RuntimeError: It is another.

    Example:
        >>> check_version("2.13.1+cpu")
    """
    if tuple(version.split(".")[:2]) != KNOWN:
        raise RuntimeError(
            f"sharded: torch is {version}, and its fully_shard is known here as of {'.'.join(KNOWN)} only: where it "
            "keeps shards is not public. Compare the attributes that forgather_fn/fsdp.py names with its code, run "
            "tests/test_sharded.py, and set KNOWN"
        )


def units_of(module: nn.Module, patterns: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Choose the modules that are gathered one at a time, inner ones first; what is in none belongs to the root.

    Args:
        module: The model.
        patterns: Of qualified names, such as ``"layers.*"``; None for the members of every ``ModuleList`` that is in no
            other unit. A ``*`` does not reach into what it has matched.

    Raises:
        ValueError: A pattern matches no module.
    """
    named = [(name, child) for name, child in module.named_modules() if name]
    if patterns is None:
        chosen = _members(named)
    else:
        chosen = []
        for pattern in patterns:
            depth = pattern.count(".")
            found = [(name, child) for name, child in named if name.count(".") == depth and fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(
                    f"sharded: {pattern!r} matches no module; there are {listed([name for name, _ in named])}"
                )
            chosen += found
    order = {name: i for i, (name, _) in enumerate(named)}
    return sorted(dict(chosen).items(), key=lambda item: -order[item[0]])


def _members(named: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Find the outermost members of module lists; a list in a list is no member, but has some."""
    lists = {name for name, child in named if isinstance(child, nn.ModuleList)}
    chosen: list[tuple[str, nn.Module]] = []
    for name, child in named:
        inside = bool(chosen) and name.startswith(f"{chosen[-1][0]}.")
        if not inside and name.rpartition(".")[0] in lists and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            chosen.append((name, child))
    return chosen


@attrs.define(eq=False)
class Fsdp:
    """A module that ``fully_shard`` has cut.

    Attributes:
        module: The root.
        units: All units, the root among them.
        trained: How trained parameters are cut.
        still: How the others are.
        used: Names of parameters that backward passes have reached since the last :meth:`begin`.
        order: A number that tells in which order units have run since then.
    """

    module: Any
    units: tuple[Any, ...]
    trained: Shards
    still: Shards
    mesh: Any
    used: set[str] = attrs.field(factory=set)
    order: int = 0
    _params: dict[str, Any] = attrs.field(factory=dict)

    def place(self, params: Flat, frozen: Mapping[str, Tensor]) -> None:
        """Make the module's shards these tensors, themselves and not copies."""
        self.rest()
        for name, held in self._params.items():
            if name in params:
                self._put(held, params[name], self.trained.block(params, name))
            elif isinstance(frozen, Flat):
                self._put(held, frozen[name], self.still.block(frozen, name))
            else:
                block = held._sharded_param_data.new_zeros(held._sharded_param_data.numel())
                block[: frozen[name].numel()] = frozen[name].reshape(-1)
                self._put(held, block[: frozen[name].numel()].view(frozen[name].shape), block)

    @staticmethod
    def _put(held: Any, shard: Tensor, block: Tensor) -> None:
        held._sharded_param_data = block
        held.sharded_param._local_tensor = shard

    def shards(self) -> dict[str, Tensor]:
        """Give this process's rows of every parameter."""
        return {name: held.sharded_param._local_tensor for name, held in self._params.items()}

    def begin(self) -> None:
        """Forget what units have run, and what parameters were reached."""
        self.used.clear()
        self.order = 0

    def rest(self) -> None:
        """Let go of what is gathered; the next pass gathers anew, from the shards as they are then."""
        for unit in self.units:
            unit.reshard()

    def recover(self) -> None:
        """Forget a forward or backward pass that has failed."""
        self.module.reset_iter_state()
        self.rest()
        for held in self._params.values():
            held.unsharded_accumulated_grad = None
            if hasattr(held, "_unsharded_param"):
                held._unsharded_param.grad = None

    def collect_in(self, gradients: Flat) -> None:
        """Have backward passes add their gradients to these tensors."""
        from torch.distributed.tensor import DTensor, Shard

        for name in gradients:
            param = self._params[name].sharded_param
            param.grad = DTensor.from_local(
                gradients.alias(name), self.mesh, [Shard(0)], shape=param.shape, stride=param.stride()
            )

    def adopt(self, unit: Any, held: Sequence[Any], names: Sequence[str]) -> None:
        """Take the shards of a unit, and note from now on which of its parameters a backward pass reaches.

        The sum over processes does not tell: it has zeros for those that no process has reached.
        """
        self._params.update(zip(names, held, strict=True))
        unit.register_forward_pre_hook(functools.partial(self._entered, self.units.index(unit) + 1))
        unit.unshard()
        for name, one in zip(names, held, strict=True):
            if one._unsharded_param.requires_grad:
                one._unsharded_param.register_post_accumulate_grad_hook(functools.partial(self._reached, name))
        unit.reshard()

    def _entered(self, number: int, unit: nn.Module, inputs: Any) -> None:
        del unit, inputs
        self.order = (self.order * 31 + number) % ORDERS

    def _reached(self, name: str, parameter: Tensor) -> None:
        del parameter
        self.used.add(name)


class Ready(Protocol):
    """Give a unit its values, before it is cut."""

    def __call__(self, names: frozenset[str], /) -> None:
        """Have the modules of these names stand whole on their device."""
        ...


def module_names(units: Sequence[tuple[str, nn.Module]]) -> list[frozenset[str]]:
    """Give the names of the modules in each unit that are in no unit before it.

    Args:
        units: Inner ones first, the whole model, named ``""``, last.
    """
    names = {id(child): name for name, child in units[-1][1].named_modules()}
    found: list[frozenset[str]] = []
    for _, unit in units:
        found.append(frozenset(names.pop(id(child)) for child in unit.modules() if id(child) in names))
    return found


def cut(
    module: nn.Module,
    patterns: Sequence[str] | None,
    trained: Shards,
    still: Shards,
    world: World,
    device: torch.device,
    ready: Ready,
) -> Fsdp:
    """Apply ``fully_shard`` to the units of a module and to the rest of it.

    Gradients are summed over processes, not averaged, in the data type of the parameters.

    Args:
        module: Changed in place.
        patterns: Which modules are units; see :func:`units_of`.
        trained: How trained parameters are cut.
        still: How the others are; they ask for no gradient.
        world: The processes.
        device: Where it is trained.
        ready: Called with the modules of each unit before that is cut; until then they may be on the meta device.

    Raises:
        ValueError: Two units share a parameter, or the parameters of one have several data types.
        RuntimeError: Torch is of another version than the one known here.
    """
    check_version(torch.__version__)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    anatomy = anatomy_of(module)
    names = {(id(site.module), site.attribute): name for site, name in anatomy.sites}
    for site, name in anatomy.sites:  # tied storage becomes one object, which is how torch knows ties
        site.module._parameters[site.attribute] = anatomy.params[name]
    units = [*units_of(module, patterns), ("", module)]
    _check_apart(units, names)
    del anatomy  # so that nobody holds what is cut
    mesh = DeviceMesh.from_group(world.group, device.type)
    for (_, unit), own in zip(units, module_names(units), strict=True):
        ready(own)
        fully_shard(unit, mesh=mesh)
    made: tuple[Any, ...] = tuple(unit for _, unit in units)
    result = Fsdp(module, made, trained, still, mesh)
    for unit in made:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        held = [one for group in fully_shard.state(unit)._fsdp_param_groups for one in group.fsdp_params]  # type: ignore[attr-defined]
        infos = [one._module_info for one in held]
        result.adopt(unit, held, [names[id(info.module), info.param_name] for info in infos])
    module.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    return result


def _check_apart(units: Sequence[tuple[str, nn.Module]], names: Mapping[tuple[int, str], str]) -> None:
    owner: dict[str, str] = {}
    seen: set[int] = set()
    for unit, module in units:
        dtypes: dict[torch.dtype, str] = {}
        for child in module.modules():
            if id(child) in seen:
                continue
            seen.add(id(child))
            for attribute, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = names[id(child), attribute]
                dtypes.setdefault(parameter.dtype, name)
                other = owner.setdefault(name, unit)
                if other != unit:
                    raise ValueError(
                        f"sharded: {name} is shared by the units {other or 'root'!r} and {unit or 'root'!r}, which are "
                        "gathered at different times; choose units so that one holds both, such as a module around them"
                    )
        if len(dtypes) > 1:
            found = ", ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
            raise ValueError(
                f"sharded: the unit {unit or 'root'!r} has parameters of several data types ({found}), and is gathered "
                "in one transfer; convert them, or choose units of one type each"
            )
