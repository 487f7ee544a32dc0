"""Which checkpoints may go: a pure function of the list and a policy."""

import math
from collections.abc import Sequence
from pathlib import Path

import attrs

from forgather_fn.checkpoint.catalog import Entry


@attrs.frozen
class Best:
    """Which result says that a checkpoint is the best.

    Attributes:
        metric: Its name.
        greater_is_better: Of the numbers compared; False where less is better.
    """

    metric: str
    greater_is_better: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen(kw_only=True)
class Policy:
    """Which checkpoints are kept.

    Attributes:
        keep: How many of the newest; None for all.
        best: The one with the best result is kept beside them.
        resumed_from: The one that this run goes on from is kept too.
    """

    keep: int | None = None
    best: Best | None = None
    resumed_from: Path | None = None


def best_of(entries: Sequence[Entry], best: Best) -> Entry | None:
    """Find the whole checkpoint with the best result: nan never is, 0.0 is a value, and of equals the earliest is."""
    found: tuple[float, Entry] | None = None
    for entry in entries:
        value = entry.manifest.metrics.get(best.metric) if entry.whole and entry.manifest else None
        if value is None or math.isnan(value):
            continue
        rank = value if best.greater_is_better else -value
        if found is None or rank > found[0]:
            found = rank, entry
    return found[1] if found else None


def superseded(entries: Sequence[Entry], policy: Policy) -> list[Entry]:
    """List what may be removed.

    Never among them: the newest whole one, the best, a pinned one, the one resumed from, what is not whole (it does not
    count as kept either), and what another tool wrote.

    Args:
        entries: In the order of their commits, as :func:`~forgather_fn.checkpoint.catalog.list_checkpoints` gives them.
        policy: What is kept.
    """
    if policy.keep is None:
        return []
    ours = [entry for entry in entries if entry.whole and entry.manifest]
    newest = ours[-max(policy.keep, 1) :]
    best = best_of(ours, policy.best) if policy.best else None
    kept = {entry.path for entry in newest} | ({best.path} if best else set())
    if policy.resumed_from is not None:
        kept.add(policy.resumed_from)
    return [entry for entry in ours if entry.path not in kept and not (entry.manifest and entry.manifest.pinned)]


def replaced(entries: Sequence[Entry], step: int) -> Entry | None:
    """Find the newest checkpoint of another training, which one that begins at a step did not go on from.

    A training that goes on, or goes back and branches, begins at the step of a checkpoint, or after the newest.

    Args:
        entries: In the order of their commits.
        step: Where the training begins.
    """
    ours = [entry for entry in entries if entry.whole and entry.manifest]
    if not ours or step >= ours[-1].step or any(entry.step == step for entry in ours):
        return None
    return ours[-1]
