"""Gradient transforms: what a gradient passes through on its way from the backward pass to the optimizer.

A transform is a pair of pure functions, ``init`` and ``update``; :class:`~forgather_fn.plan.Plan` takes a sequence of
them, and each is given what the one before has made.
"""

from forgather_fn.transforms.base import Transform as Transform
from forgather_fn.transforms.base import TransformInit as TransformInit
from forgather_fn.transforms.base import TransformUpdate as TransformUpdate
from forgather_fn.transforms.base import chain as chain
from forgather_fn.transforms.base import stateless as stateless
from forgather_fn.transforms.centring import centralised as centralised
from forgather_fn.transforms.clipping import clipped as clipped
from forgather_fn.transforms.clipping import clipped_by_group as clipped_by_group
from forgather_fn.transforms.clipping import clipped_by_unit as clipped_by_unit
from forgather_fn.transforms.clipping import clipped_by_value as clipped_by_value
from forgather_fn.transforms.noise import annealed as annealed
from forgather_fn.transforms.noise import noise as noise
