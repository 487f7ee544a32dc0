"""Which names a configuration may build: a registry, and what the caller adds. Never what the configuration says."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from forgather_fn.config.builtin import BUILTINS
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import split_target
from forgather_fn.config.registry import FAMILIES, NAMES, PACKAGES
from forgather_fn.importing import import_named

_TOO_WIDE: Final = frozenset({"torch", "numpy", "forgather_fn"}) | sys.stdlib_module_names


def check_allowed(target: str, allow: Collection[str]) -> None:
    """Refuse a name that neither the registry nor the caller admits. Nothing is imported.

    Args:
        target: As a configuration names it.
        allow: What the caller adds: ``package.module:Name``, or ``package`` for whatever is defined in it, or a file.

    Raises:
        ConfigError: It is not admitted; the message has the option that would.
    """
    module, name = split_target(target)
    if "__" in name:
        raise ConfigError(f"{target}: names with '__' are never called")
    if module is None:
        if name in BUILTINS or _exact(target) in allow or target in allow:
            return
        raise ConfigError(f"{target} may not be called: add --allow {_exact(target)} if you trust this configuration")
    if target in allow or target in NAMES:
        return
    public = not any(part.startswith("_") for part in name.split("."))
    if public and "." not in name and module in FAMILIES:
        return
    if public and _package(module, allow) is not None:
        return
    raise ConfigError(
        f"{target} is not among the constructors that are known to be harmless: add --allow {target} if you trust this "
        "configuration"
    )


def check_allow(allow: Collection[str]) -> None:
    """Refuse what cannot be allowed.

    Raises:
        ConfigError: One is no name, or a package so wide that it would admit anything.
    """
    if isinstance(allow, str):
        raise ConfigError(f"allow takes a collection of names: allow=[{allow!r}]")
    for one in allow:
        module, separator, _ = one.rpartition(":")
        if separator:
            split_target(one)
        elif one.endswith(".py"):
            continue
        elif not all(part.isidentifier() for part in one.split(".")):
            raise ConfigError(f"--allow {one}: expected package.module:Name, a package, or a file")
        elif one.partition(".")[0] in _TOO_WIDE:
            raise ConfigError(f"--allow {one} would admit far more than constructors: allow {one}:NAME, name by name")
        del module


def resolve(target: str, allow: Collection[str]) -> Any:
    """Import what a name means, if it is admitted.

    What a package or a family admits must also be defined there: that a module has a name does not make it its own.

    Raises:
        ConfigError: It is not admitted, or is not there.
    """
    check_allowed(target, allow)
    module, name = split_target(target)
    if module is None and name in BUILTINS:
        return BUILTINS[name]
    named = target in allow or _added(module or "", allow) is not None  # the registry's lie where they are installed
    holder = _load(module or "builtins", target, import_named if named else importlib.import_module)
    found: Any = holder
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"{target} is not there: {error}") from None
    if not callable(found):
        raise ConfigError(f"{target} is a {type(found).__name__}, which cannot be called")
    if module is not None and target not in allow and target not in NAMES:
        _check_definition(target, module, found, allow)
    return found


def _check_definition(target: str, module: str, found: Any, allow: Collection[str]) -> None:
    home = getattr(found, "__module__", None) or ""
    if module in FAMILIES:
        family = FAMILIES[module]
        base = resolve_base(family.base)
        if isinstance(found, type) and issubclass(found, base) and f"{home}.".startswith(family.defined):
            return
        expected = f"a subclass of {family.base}"
    else:
        package = _package(module, allow)
        assert package is not None
        is_own = home == package or home.startswith(f"{package}.") or package.endswith(".py")
        kinds = "class" if package in PACKAGES and module != package else "class or function"
        if is_own and _package(home, allow) is not None and _is_a(found, kinds):
            return
        expected = f"a {kinds} that is defined in {package}"
    raise ConfigError(
        f"{target} is {type(found).__name__} {getattr(found, '__qualname__', '')} of {home or 'an unknown module'}, "
        f"expected {expected}: add --allow {target} if you trust this configuration"
    )


def _is_a(found: Any, kinds: str) -> bool:
    return inspect.isclass(found) or (kinds != "class" and inspect.isroutine(found))


def resolve_base(name: str) -> type:
    """Import the base of a family."""
    module, _, attribute = name.partition(":")
    base: type = getattr(importlib.import_module(module), attribute)
    return base


def _package(module: str, allow: Collection[str]) -> str | None:
    """Find the admitted package that a module, or file, lies in."""
    for package, without in PACKAGES.items():
        if (module == package or module.startswith(f"{package}.")) and not without & set(module.split(".")):
            return package
    return _added(module, allow)


def _added(module: str, allow: Collection[str]) -> str | None:
    """Find the package, or file, that the caller admits and a module lies in."""
    for one in allow:
        if ":" not in one and (module == one or module.startswith(f"{one}.")):
            return one
    return None


def _load(module: str, target: str, load: Callable[[str], ModuleType]) -> ModuleType:
    try:
        return _load_file(Path(module)) if module.endswith(".py") else load(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{target} cannot be imported: {error}; is it installed, or in the current directory?"
        ) from error
    except OSError as error:
        raise ConfigError(f"{target} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise ConfigError(f"importing {module} failed: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    name = str(path.resolve())
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _exact(target: str) -> str:
    return f"builtins:{target}"
