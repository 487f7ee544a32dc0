"""Names of a package that are loaded when they are first asked for."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def when_used(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package (PEP 562).

    Args:
        package: Its ``__name__``.
        where: For each name that is loaded when it is first asked for, the module that has it.

    Example:
        >>> getattr_ = when_used("forgather.ml", {"TrainOutput": "forgather.ml.trainer.trainer_types"})
        >>> getattr_("TrainOutput").__name__
        'TrainOutput'
        >>> getattr_("Trainor")
        Traceback (most recent call last):
        AttributeError: module 'forgather.ml' has no attribute 'Trainor'
    """

    def load(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        found = getattr(importlib.import_module(where[name]), name)
        vars(sys.modules[package])[name] = found
        return found

    return load
