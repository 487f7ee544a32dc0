"""Reducers: folds over numbers, whose value so far is a part of the state.

What reacts to results or losses (a schedule, an end, a rollback) does so by one of these. What they keep lies in
``state.controls``, so it is in the checkpoint, and a run that goes on from the middle reacts as if it had not stopped.
"""

from forgather_fn.reducers.base import Control as Control
from forgather_fn.reducers.base import Kept as Kept
from forgather_fn.reducers.base import Reducer as Reducer
from forgather_fn.reducers.improvement import plateau as plateau
from forgather_fn.reducers.improvement import stale as stale
from forgather_fn.reducers.spikes import spikes as spikes
