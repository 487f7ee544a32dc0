"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def deferred_names(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` (PEP 562).

    So importing a package, or one module of it, takes no longer than what is used of it. The package imports the same
    names under ``TYPE_CHECKING``, for those who read it without running it.

    Args:
        package: Its name.
        names: For each module of the package, names that are taken from it, apart by spaces; for ``""``, the modules
            that are names themselves.

    Returns:
        The two functions. A name is looked up once; then the package has it like any other.

    Example:
        >>> look_up, names = deferred_names("collections", {"abc": "Iterator Mapping"})
        >>> names()
        ['Iterator', 'Mapping']
        >>> look_up("Mapping").__name__
        'Mapping'
    """
    modules = {name: module for module, taken in names.items() for name in taken.split()}
    listed = sorted(modules)

    def look_up(name: str) -> Any:
        if name not in modules:
            # With name and object, Python's traceback adds the nearest name that there is.
            missing = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(missing, name=name, obj=sys.modules[package])
        try:
            module = importlib.import_module(f"{package}.{modules[name] or name}")
        except AttributeError as error:  # else it would seem to be of the package, which hasattr and import swallow
            raise ImportError(f"{package}.{modules[name] or name} cannot be imported: {error}") from error
        value = getattr(module, name) if modules[name] else module
        setattr(sys.modules[package], name, value)
        return value

    return look_up, lambda: listed
