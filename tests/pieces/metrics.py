"""Metrics: beside a loss, and of evaluations."""

import forgather_fn as ff
from forgather_fn.loop import Stage
from forgather_fn.program import Measure
from tests import specimens
from tests.pieces.losses import words
from tests.pieces.piece import Piece


def beside(*metrics: Measure) -> Piece:
    """Measure in each step, beside a loss of the next token."""
    loss = ff.losses.with_metrics(ff.losses.causal_lm, *metrics)
    return Piece(fields=lambda: {"loss": loss, "model": specimens.tied_by_object}, batch=words)


def reduced(*measures: Measure) -> Piece:
    """Measure in evaluations, also of a run."""

    def stages() -> tuple[Stage, ...]:
        return (ff.every(2, ff.evaluated(ff.batches(words(7), batch_size=3), metrics=measures)),)

    return Piece(
        fields=lambda: {"loss": ff.losses.causal_lm, "model": specimens.tied_by_object},
        batch=words,
        stages=stages,
        metrics=lambda: measures,
    )


PIECES = {
    "with_metrics/accuracy, top_k, bits_per_byte": beside(
        ff.metrics.accuracy,
        ff.metrics.top_k(3),
        ff.metrics.bits_per_byte(bytes=lambda batch: batch["bytes"][:, 1:]),
    ),
    "evaluated/accuracy, perplexity, f1, confusion": reduced(
        ff.metrics.accuracy,
        ff.metrics.perplexity,
        ff.metrics.f1(classes=specimens.WORDS),
        ff.metrics.confusion(classes=specimens.WORDS),
    ),
}
