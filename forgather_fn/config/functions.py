"""The functions and filters that templates have."""

import datetime as dt
import os
import platform
import socket
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
from jinja2 import Undefined

from forgather_fn.config.emit import inline
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.secrets import is_secret

LIBRARIES: Final = ("torch", "transformers", "accelerate")


@attrs.define(eq=False)
class Surroundings:
    """What templates see of the machine. One instant holds for a whole rendering.

    Attributes:
        now: Seconds since 1970.
        environ: Environment variables.
        secrets: Collects the values of those that were looked up under secret names.
    """

    now: float
    environ: Mapping[str, str]
    secrets: set[str] = attrs.field(factory=set)

    def getenv(self, name: str, default: str | None = None) -> str | None:
        """Look up an environment variable."""
        value = self.environ.get(name, default)
        if is_secret(name) and value:
            self.secrets.add(value)
        return value

    def local(self) -> dt.datetime:
        """Give the instant in local time."""
        return dt.datetime.fromtimestamp(self.now)

    def utc(self) -> dt.datetime:
        """Give the instant in UTC."""
        return dt.datetime.fromtimestamp(self.now, dt.UTC).replace(tzinfo=None)


def global_names(surroundings: Surroundings) -> dict[str, Any]:
    """Give the names that every template has."""
    stamp = "%Y-%m-%dT%H-%M-%S"
    found: dict[str, Any] = {
        "isotime": lambda: surroundings.local().isoformat(timespec="seconds"),
        "utcisotime": lambda: surroundings.utc().isoformat(timespec="seconds"),
        "filetime": lambda: surroundings.local().strftime(stamp),
        "utcfiletime": lambda: surroundings.utc().strftime(stamp),
        "now": surroundings.local,
        "utcnow": surroundings.utc,
        "getenv": surroundings.getenv,
        "hostname": socket.gethostname(),
        "uname": platform.uname(),
        "versions": versions(),
    }
    return {**_PLAIN, **found}


def versions() -> dict[str, str]:
    """Name the versions of Python and the libraries that a run depends on; those that are not installed are left out.

    Example:
        >>> {"python", "torch", "numpy"} <= set(versions())
        True
    """
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, "numpy", "forgather-fn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def toyaml(value: Any, default: Any = None) -> str:
    """Write a value as YAML on one line; where it is undefined, the default.

    Example:
        >>> toyaml("yes"), toyaml([1, 1e-5, None])
        ("'yes'", '[1, 1.0e-05, null]')
    """
    return inline(default if isinstance(value, Undefined) else value)


def _raise(message: str = "") -> NoReturn:
    raise ConfigError(message)


def _assert(condition: Any, message: str = "") -> str:
    if not condition:
        raise ConfigError(message or "an assertion in the template does not hold")
    return ""


def _modname_from_path(path: str) -> str:
    return Path(path).stem


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def forgather_config_dir() -> str:
    """Name the user's own folder of templates and settings."""
    return str(_config_home() / "forgather")


def _user_data_dir(appname: str = "forgather", *rest: str) -> str:
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return str(home.joinpath(appname, *rest))


def _user_cache_dir(appname: str = "forgather", *rest: str) -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath(appname, *rest))


def _user_config_dir(appname: str = "forgather", *rest: str) -> str:
    return str(_config_home().joinpath(appname, *rest))


_PLAIN: Final[Mapping[str, Callable[..., Any]]] = {
    "joinpath": os.path.join,
    "normpath": os.path.normpath,
    "abspath": os.path.abspath,
    "relpath": os.path.relpath,
    "dirname": os.path.dirname,
    "basename": os.path.basename,
    "splitext": os.path.splitext,
    "raise": _raise,
    "assert": _assert,
    "repr": repr,
    "modname_from_path": _modname_from_path,
    "user_home_dir": lambda: str(Path.home()),
    "getcwd": os.getcwd,
    "forgather_config_dir": forgather_config_dir,
    "user_data_dir": _user_data_dir,
    "user_cache_dir": _user_cache_dir,
    "user_config_dir": _user_config_dir,
}
FILTERS: Final[Mapping[str, Callable[..., Any]]] = {"toyaml": toyaml}
