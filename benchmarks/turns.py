"""Taking turns: what is timed in one process, each round beginning with another arm."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import attrs


@attrs.define
class Spent:
    """Seconds: on the wall, and of CPU time of all threads of this process, where that says something."""

    wall: float = 0.0
    cpu: float | None = None


Arm = Callable[[], Mapping[str, Spent]]
"""Do something once, and give what its parts took, by name."""


@attrs.frozen
class Timed:
    """What one part took in each round."""

    name: str
    wall: list[float] = attrs.field(factory=list)
    cpu: list[float] = attrs.field(factory=list)

    def as_json(self) -> dict[str, object]:
        """Give it for writing."""
        return {"arm": self.name, "wall": self.wall, "cpu": self.cpu}


@contextmanager
def timing() -> Iterator[Spent]:
    """Time a block; what is given is filled in at its end."""
    spent, wall, cpu = Spent(), time.perf_counter(), time.process_time()
    yield spent
    spent.wall, spent.cpu = time.perf_counter() - wall, time.process_time() - cpu


def in_turns(arms: Sequence[Arm], rounds: int) -> dict[str, Timed]:
    """Let the arms take turns, and join what each part took."""
    found: dict[str, Timed] = {}
    for turn in range(rounds):
        first = turn % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            gc.collect()
            for name, spent in arm().items():
                part = found.setdefault(name, Timed(name))
                part.wall.append(spent.wall)
                if spent.cpu is not None:
                    part.cpu.append(spent.cpu)
    return found
