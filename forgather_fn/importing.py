"""Importing what a user named: on the command line, or in a configuration that they trust."""

import importlib
import os
import sys
from types import ModuleType


def import_named(name: str) -> ModuleType:
    """Import a module, also one that lies in the current directory, as ``python -m`` does.

    A command that was installed does not look there by itself. What is installed comes first.

    Raises:
        ImportError: There is none, or it cannot be imported.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    return importlib.import_module(name)
