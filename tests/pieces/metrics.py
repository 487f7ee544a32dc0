"""Metrics: beside a loss, and of evaluations."""

import forgather_fn as ff
from forgather_fn.loop import Stage
from forgather_fn.plan import Measure
from tests import specimens
from tests.pieces.losses import words
from tests.pieces.piece import Piece


def beside(*metrics: Measure) -> Piece:
    """Measure in each step, beside a loss of the next token."""
    loss = ff.losses.with_metrics(ff.losses.causal_lm, *metrics)
    return Piece(fields=lambda: {"loss": loss, "model": specimens.tied_by_object}, batch=words)


def reduced(measure: Measure) -> Piece:
    """Measure in evaluations, also of a run."""

    def stages() -> tuple[Stage, ...]:
        return (ff.every(2, ff.evaluated(ff.batches(words(7), batch_size=3), metrics=(measure,))),)

    return Piece(
        fields=lambda: {"loss": ff.losses.causal_lm, "model": specimens.tied_by_object},
        batch=words,
        stages=stages,
        metrics=lambda: (measure,),
    )


PIECES = {
    "with_metrics": beside(ff.metrics.accuracy),
    "top_k": beside(ff.metrics.top_k(3)),
    "bits_per_byte": beside(ff.metrics.bits_per_byte(bytes=lambda batch: batch["bytes"][:, 1:])),
    "accuracy": reduced(ff.metrics.accuracy),
    "perplexity": reduced(ff.metrics.perplexity),
    "f1": reduced(ff.metrics.f1(classes=specimens.WORDS)),
    "confusion": reduced(ff.metrics.confusion(classes=specimens.WORDS)),
}
