"""Metrics: what is measured of outputs and batches besides the loss, as means of parts or as aggregates."""

from forgather_fn.metrics.base import Aggregate as Aggregate
from forgather_fn.metrics.base import Measure as Measure
from forgather_fn.metrics.base import Metric as Metric
from forgather_fn.metrics.base import Partial as Partial
from forgather_fn.metrics.classes import accuracy as accuracy
from forgather_fn.metrics.classes import confusion as confusion
from forgather_fn.metrics.classes import f1 as f1
from forgather_fn.metrics.classes import top_k as top_k
from forgather_fn.metrics.language import bits_per_byte as bits_per_byte
from forgather_fn.metrics.language import perplexity as perplexity
