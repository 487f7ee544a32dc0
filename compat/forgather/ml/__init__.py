"""Trainer classes over the functions of :mod:`forgather_fn`, with the interface of transformers' own.

Names are loaded when they are first asked for: importing one of them takes a third of what transformers' trainer does.
Their types are in ``__init__.pyi``.
"""

from forgather.ml import trainer as _trainer
from forgather.ml.when_used import when_used

_WHERE = {**dict.fromkeys(_trainer.__all__, _trainer.__name__), "DistributedEnvironment": "forgather.ml.distributed"}

__all__ = sorted(_WHERE)
__getattr__ = when_used(__name__, _WHERE)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
