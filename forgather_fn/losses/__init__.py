"""Objectives: functions of (outputs, batch) that give a sum and its weight."""

from forgather_fn.losses.base import RESERVED as RESERVED
from forgather_fn.losses.base import Arguments as Arguments
from forgather_fn.losses.base import Loss as Loss
from forgather_fn.losses.base import Objective as Objective
from forgather_fn.losses.base import named_means as named_means
from forgather_fn.losses.entropy import causal_lm as causal_lm
from forgather_fn.losses.entropy import cross_entropy as cross_entropy
from forgather_fn.losses.entropy import smoothed_cross_entropy as smoothed_cross_entropy
from forgather_fn.losses.finding import TARGETS as TARGETS
from forgather_fn.losses.finding import leading_dimension as leading_dimension
from forgather_fn.losses.finding import logits_of as logits_of
from forgather_fn.losses.finding import target_of as target_of
from forgather_fn.losses.regression import mse as mse
from forgather_fn.losses.returned import WEIGHTS as WEIGHTS
from forgather_fn.losses.returned import from_output as from_output
