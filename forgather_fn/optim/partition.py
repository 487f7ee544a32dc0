"""Several optimizers as one: each updates the parameters that are its own."""

from collections.abc import Mapping, Sequence

import attrs
from torch import Tensor

from forgather_fn.describe import describe, described
from forgather_fn.flat import Flat, listed
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Predicate, matches
from forgather_fn.hyper import Hyper
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_optimizer
from forgather_fn.optim.sections import sections
from forgather_fn.schedules import Schedule

Match = str | Predicate | Sequence[str]
"""Which parameters: a pattern, several, or a predicate of name and tensor."""


@described
def partitioned(parts: Mapping[str, tuple[Match, Optimizer]]) -> Optimizer:
    """Compose optimizers over disjoint sets of parameters: each has the first part that matches it.

    The parameters of a part lie side by side in the flat storage, and its optimizer works on them as if there were no
    others; slots are kept for its own parameters only. Its schedules are reported behind its name, such as
    ``weight_decay/NAME``. All parts have the learning rate of the plan; ``groups=[ff.group("*", learning_rate=0.1)]``
    gives one a factor.

    Args:
        parts: By name: ``(pattern, patterns, or predicate, optimizer)``. In order; ``"*"`` matches all that is left, if
            anything is.

    Raises:
        ValueError: There are none, a name has a slash or is empty; or, when a state is made, a parameter has no part,
            or a part no parameter.

    Example:
        >>> import torch, forgather_fn as ff
        >>> both = partitioned({"sparse": ("embed.*", ff.sgd()), "rest": ("*", ff.adamw())})
        >>> hypers = both.groups({"embed.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)})
        >>> [hyper.part for hyper in hypers.values()]
        ['sparse', 'rest']
    """
    if not isinstance(parts, Mapping) or not all(isinstance(part, tuple) and len(part) == 2 for part in parts.values()):
        raise ValueError(f"partitioned: expected a mapping of names to (match, optimizer); got {describe(parts)}")
    odd = [name for name in parts if not name or "/" in name]
    if odd or not parts:
        raise ValueError(f"partitioned: expected names without a slash, each with (match, optimizer); got {[*parts]}")
    for name, (_, optimizer) in parts.items():
        check_optimizer(f"partitioned: part {name!r}", optimizer)
    optimizers = {name: optimizer for name, (_, optimizer) in parts.items()}
    renamed = {
        name: {own: _renamed(own, name) for own in optimizer.schedules} for name, optimizer in optimizers.items()
    }
    schedules: dict[str, Schedule] = {
        renamed[name][own]: schedule
        for name, optimizer in optimizers.items()
        for own, schedule in optimizer.schedules.items()
    }

    def groups(params: Mapping[str, Tensor]) -> Mapping[str, Hyper]:
        found: dict[str, Hyper] = {}
        for name, own in _assigned(parts, params).items():
            for key, hyper in optimizers[name].groups(own).items():
                found[key] = attrs.evolve(hyper, part=f"{name}/{hyper.part}" if hyper.part else name)
        return {name: found[name] for name in params}

    def init(params: Flat) -> OptState:
        found = sections(params.layout)
        return {name: one.init(found[name].of(params)) if name in found else {} for name, one in optimizers.items()}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        found, new = sections(params.layout), dict(state)
        for name, optimizer in optimizers.items():
            own = found[name].gradients(gradients) if name in found else None
            if own is None or not any(own.active):
                continue
            scheduled = {inner: context.scheduled[outer] for inner, outer in renamed[name].items()}
            inner = context._replace(scheduled=scheduled)
            new[name] = optimizer.update(own, state[name], found[name].of(params), inner)
        return state if all(new[name] is state[name] for name in new) else new

    def evaluated(state: OptState, params: Flat) -> Flat:
        result, found = params.copy(), sections(params.layout)
        for name, optimizer in optimizers.items():
            if optimizer.evaluated is not None and name in found:
                found[name].of(result).assign(optimizer.evaluated(state[name], found[name].of(params)))
        return result

    every = optimizers.values()
    return Optimizer(
        init,
        update,
        groups,
        compiles=all(one.compiles for one in every),
        separable=all(one.separable for one in every),
        schedules=schedules,
        parts=optimizers,
        evaluated=evaluated if any(one.evaluated for one in every) else None,
    )


def _renamed(name: str, part: str) -> str:
    kind, slash, rest = name.partition("/")
    return f"{kind}/{part}{slash}{rest}"


def _assigned(
    parts: Mapping[str, tuple[Match, Optimizer]], params: Mapping[str, Tensor]
) -> Mapping[str, Mapping[str, Tensor]]:
    """Give each part its parameters."""
    own: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    left = []
    for key, tensor in params.items():
        part = next((name for name, (match, _) in parts.items() if _chosen(match, key, tensor)), None)
        if part is None:
            left.append(key)
        else:
            own[part][key] = tensor
    if left:
        raise ValueError(f"partitioned: {listed(left)} match no part; let the last one match the rest with '*'")
    for name, held in own.items():
        if not held and parts[name][0] != "*":
            raise ValueError(
                f"partitioned: part {name!r} matches no parameter that is left by those before it; the parameters are "
                f"{listed(sorted(params))}"
            )
    return own


def _chosen(match: Match, name: str, tensor: Tensor) -> bool:
    if isinstance(match, str) or callable(match):
        return matches(match, name, tensor)
    return any(matches(pattern, name, tensor) for pattern in match)
