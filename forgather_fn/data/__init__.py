"""Streams of batches: which samples come when, as algebra on positions, and how they are read."""

from forgather_fn.data.batch import Batch as Batch
from forgather_fn.data.batching import batches as batches
from forgather_fn.data.files import memmap_tokens as memmap_tokens
from forgather_fn.data.files import text_bytes as text_bytes
from forgather_fn.data.files import text_lines as text_lines
from forgather_fn.data.indexed import IndexedStream as IndexedStream
from forgather_fn.data.iterated import IteratedStream as IteratedStream
from forgather_fn.data.lengths import by_length as by_length
from forgather_fn.data.masks import block_mask as block_mask
from forgather_fn.data.masks import flash_arguments as flash_arguments
from forgather_fn.data.mixing import Mixture as Mixture
from forgather_fn.data.mixing import mixture as mixture
from forgather_fn.data.order import Ordering as Ordering
from forgather_fn.data.packing import Packed as Packed
from forgather_fn.data.packing import best_fit as best_fit
from forgather_fn.data.packing import packed as packed
from forgather_fn.data.resumable import Reader as Reader
from forgather_fn.data.resumable import Resumable as Resumable
from forgather_fn.data.resumable import counted as counted
from forgather_fn.data.sizes import rampup as rampup
from forgather_fn.data.stream import Stream as Stream
