"""The arms: this library, the loop written by hand, and the peers that are installed."""

from importlib.util import find_spec

from benchmarks import peers
from benchmarks.loops import by_hand, by_library, by_trainer, columns, loader, streamed
from benchmarks.measure import NO_DATA, Arm
from benchmarks.task import Rows

TORCH_LOADER = "yes: torch's DataLoader"
BY_HAND = "hand-written"
OURS = "forgather_fn"
CLASSES = "forgather.ml.Trainer"

LOADED = (
    Arm(BY_HAND, TORCH_LOADER, lambda task, clock: by_hand(task, clock, loader(task))),
    Arm(BY_HAND, "yes: tokens[order]", lambda task, clock: by_hand(task, clock, task.fetched())),
    Arm(OURS, "yes: batches(columns)", lambda task, clock: by_library(task, clock, streamed(task, columns(task)))),
    Arm(OURS, "yes: batches(samples)", lambda task, clock: by_library(task, clock, streamed(task, Rows(task.tokens)))),
    Arm(CLASSES, TORCH_LOADER, by_trainer),
)
"""With data loading, the one that all are compared to first. All but ``tokens[order]`` and columns read samples one by
one, as map-style datasets give them."""

ALONE = (
    Arm(BY_HAND, NO_DATA, lambda task, clock: by_hand(task, clock, task.batches)),
    Arm(OURS, NO_DATA, lambda task, clock: by_library(task, clock, task.batches)),
)
"""Without."""

PEERS_LOADED = (
    Arm("Accelerate", TORCH_LOADER, lambda task, clock: peers.by_accelerate(task, clock, loader(task))),
    Arm("Lightning Fabric", TORCH_LOADER, lambda task, clock: peers.by_fabric(task, clock, loader(task))),
    Arm("Lightning Trainer", TORCH_LOADER, lambda task, clock: peers.by_lightning(task, clock, loader(task))),
    Arm("transformers.Trainer", TORCH_LOADER, peers.by_transformers),
)

PEERS_ALONE = (
    Arm("Accelerate", NO_DATA, lambda task, clock: peers.by_accelerate(task, clock, task.batches)),
    Arm("Lightning Fabric", NO_DATA, lambda task, clock: peers.by_fabric(task, clock, task.batches)),
    Arm(
        "Lightning Trainer", NO_DATA, lambda task, clock: peers.by_lightning(task, clock, peers.Iterated(task.batches))
    ),
)

_PACKAGES = {
    "Accelerate": "accelerate",
    "Lightning Fabric": "lightning",
    "Lightning Trainer": "lightning",
    "transformers.Trainer": "transformers",
}


def installed(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Leave out the peers whose package is not installed."""
    return tuple(arm for arm in arms if find_spec(_PACKAGES[arm.name]))


def left_out() -> tuple[str, ...]:
    """Name them, so that no table is short without saying so."""
    missing = [name for name, package in _PACKAGES.items() if not find_spec(package)]
    return (f"Left out, because not installed: {', '.join(missing)}.",) if missing else ()
