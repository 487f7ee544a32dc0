"""Low-rank adapters: a few trained numbers beside the weights of a model, which stay as they are."""

from forgather_fn.adapters.low_rank import LowRank as LowRank
from forgather_fn.adapters.low_rank import adapters_of as adapters_of
from forgather_fn.adapters.low_rank import lora as lora
from forgather_fn.adapters.merging import merged as merged
from forgather_fn.adapters.merging import restarted as restarted
from forgather_fn.adapters.merging import unmerged as unmerged
