"""Randomness that is derived, never stored: a key is a pure function of where it is used."""

import contextlib
import hashlib
from typing import Final

import attrs
import torch

from forgather_fn.turn import turn

_PLAIN: Final = frozenset((int, str))


def key(seed: int, *path: int | str) -> int:
    """Derive the random key of one place in a run.

    A key depends on the seed and on the *path* (step, global microbatch index, name of the stream, ...) and on nothing
    else: not on a rank, a process, or what was drawn before. No two paths share a key, unlike ``seed + epoch``, where
    (0, 1) meets (1, 0). The parts are hashed as UTF-8 with their types, so ``1`` and ``"1"`` differ.

    Args:
        seed: The root of every stream of the run.
        path: Integers and names, from the general to the particular.

    Returns:
        An integer in ``[0, 2**63)``, fit for ``torch.Generator.manual_seed`` and ``numpy.random.default_rng``.

    Example:
        >>> key(0, 7, "dropout") == key(0, 7, "dropout")
        True
        >>> key(0, 1) == key(1, 0)
        False
    """
    parts = seed, *path
    if not _PLAIN.issuperset(map(type, parts)):
        parts = tuple(part if type(part) in _PLAIN else int(part) for part in parts)
    digest = hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generators(device: torch.device) -> list[torch.Generator]:
    """Give the global generators that a computation on a device may draw from: the CPU's, and the device's own."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


def reseed(value: int, device: torch.device) -> None:
    """Seed the global generators; within :func:`seeded`, which puts them back."""
    for generator in generators(device):
        generator.manual_seed(value)


def seeded(value: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Run a block under a seed, and put torch's generators back as they were; other threads wait for their turn.

    Args:
        value: A key, as :func:`key` makes it.
        device: Whose generator is seeded, beside the CPU's.
    """
    return _Seeded(value, generators(device))


@attrs.define(eq=False)
class _Seeded(contextlib.AbstractContextManager[None]):
    """A block under a seed: written out, since a generator in its place takes as long as all that it does."""

    value: int
    used: list[torch.Generator]
    _states: list[torch.Tensor] = attrs.field(factory=list)
    _turn: contextlib.AbstractContextManager[bool] = attrs.field(factory=turn)

    def __enter__(self) -> None:
        self._turn.__enter__()
        for generator in self.used:
            self._states.append(generator.get_state())
            generator.manual_seed(self.value)

    def __exit__(self, *raised: object) -> None:
        for generator, state in zip(self.used, self._states, strict=True):
            generator.set_state(state)
        self._turn.__exit__(None, None, None)
