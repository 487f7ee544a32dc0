"""Schedules: pure functions from a step to a value, most often the learning rate.

``step`` is the number of optimizer updates already begun: step 0 is the rate of the first update, as in torch's
``LambdaLR``, and the last of ``total`` updates reads step ``total - 1``. The words that the factories share:

    peak: The highest value, reached when the warm-up ends.
    warmup: Length of the straight rise from 0 to ``peak``, in optimizer steps.
    total: Length of the whole schedule, warm-up included, in optimizer steps. From there on the value is ``final``.
    final: The value at the end, at most ``peak``.

A factory raises ``ValueError`` where a number is negative or not finite, or where arguments contradict each other.
References are those of torch 2.13 and transformers 5.23; "to rounding" means within 1e-12 of the peak.
"""

from forgather_fn.schedules.base import Curve as Curve
from forgather_fn.schedules.base import Reactive as Reactive
from forgather_fn.schedules.base import Schedule as Schedule
from forgather_fn.schedules.base import half_cosine as half_cosine
from forgather_fn.schedules.base import one_minus_sqrt as one_minus_sqrt
from forgather_fn.schedules.base import rate as rate
from forgather_fn.schedules.base import sqrt_of_rest as sqrt_of_rest
from forgather_fn.schedules.base import straight as straight
from forgather_fn.schedules.base import wave as wave
from forgather_fn.schedules.decays import constant as constant
from forgather_fn.schedules.decays import cosine as cosine
from forgather_fn.schedules.decays import cosine_with_restarts as cosine_with_restarts
from forgather_fn.schedules.decays import inverse_sqrt as inverse_sqrt
from forgather_fn.schedules.decays import linear as linear
from forgather_fn.schedules.decays import one_cycle as one_cycle
from forgather_fn.schedules.decays import polynomial as polynomial
from forgather_fn.schedules.decays import warmup_stable_decay as warmup_stable_decay
from forgather_fn.schedules.pieces import ahead as ahead
from forgather_fn.schedules.pieces import along as along
from forgather_fn.schedules.pieces import joined as joined
from forgather_fn.schedules.pieces import piecewise as piecewise
from forgather_fn.schedules.pieces import scaled as scaled
from forgather_fn.schedules.reactive import on_plateau as on_plateau
