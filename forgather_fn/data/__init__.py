"""Streams of batches: which samples come when, as algebra on positions, and how they are read."""

from forgather_fn.data.batch import Batch as Batch
from forgather_fn.data.batching import batches as batches
from forgather_fn.data.stream import VERSION as VERSION
from forgather_fn.data.stream import Stream as Stream
