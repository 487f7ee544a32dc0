"""What reacts to results and losses, and changes the state between two steps."""

import forgather_fn as ff
from forgather_fn.loop import Tick
from tests.pieces.piece import Piece, falling


def alternating(tick: Tick) -> dict[str, float]:
    """Observe a result that is no better at every second step."""
    return {"eval_loss": 1.0 - 0.1 * (tick.state.step // 2)}


def second(tick: Tick) -> ff.TrainState | None:
    """Change the parameters after step 2."""
    if tick.state.step != 2:
        return None
    changed = tick.state.copy()
    for tensor in changed.params.values():
        tensor.mul_(0.5)
    return changed.controlled({**changed.controls, "halved": tick.state.step})


def bad(tick: Tick) -> dict[str, float]:
    """Observe that steps 2 and 3 are bad."""
    return {"bad": float(tick.state.step in (2, 3))}


PIECES = {
    "on_plateau": Piece(
        fields=lambda: {"schedule": ff.schedules.on_plateau(falling, factor=0.5, patience=0)},
        stages=lambda: (ff.every(1, alternating),),
    ),
    "early_stopped": Piece(stages=lambda: (ff.every(1, alternating), ff.early_stopped(patience=3))),
    "changing": Piece(stages=lambda: (ff.changing(second),)),
    "folded": Piece(stages=lambda: (ff.folded("spike", ff.reducers.spikes(least=2, threshold=1.0)),)),
    "rollback": Piece(
        stages=lambda: (ff.every(1, bad), ff.rollback(after=2, every=1, on="bad")),
        outside={"resume": "its copy is in memory alone: a run that is restored at a bad step goes back to that step"},
    ),
}
