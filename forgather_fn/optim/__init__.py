"""Optimizers: pairs of pure functions over flat storage, ``init`` and ``update``.

Each is a thin layer over torch's own maths where torch has it, and over the published algorithm where it has not.
"""

from forgather_fn.optim.adafactor import adafactor as adafactor
from forgather_fn.optim.adam import adam as adam
from forgather_fn.optim.adam import adamw as adamw
from forgather_fn.optim.adamw_bfloat16 import adamw_bfloat16 as adamw_bfloat16
from forgather_fn.optim.base import Evaluated as Evaluated
from forgather_fn.optim.base import Optimizer as Optimizer
from forgather_fn.optim.base import OptimizerInit as OptimizerInit
from forgather_fn.optim.base import OptimizerUpdate as OptimizerUpdate
from forgather_fn.optim.base import OptState as OptState
from forgather_fn.optim.base import UpdateContext as UpdateContext
from forgather_fn.optim.base import slots_like as slots_like
from forgather_fn.optim.from_torch import from_torch as from_torch
from forgather_fn.optim.lion import lion as lion
from forgather_fn.optim.lookahead import lookahead as lookahead
from forgather_fn.optim.master import master_weights as master_weights
from forgather_fn.optim.muon import hidden_matrices as hidden_matrices
from forgather_fn.optim.muon import muon as muon
from forgather_fn.optim.muon import orthogonal as orthogonal
from forgather_fn.optim.partition import partitioned as partitioned
from forgather_fn.optim.schedule_free import schedule_free_adamw as schedule_free_adamw
from forgather_fn.optim.sgd import sgd as sgd
from forgather_fn.optim.table import Table as Table
from forgather_fn.optim.table import describe as describe
