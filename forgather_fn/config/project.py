"""Projects: a folder with a ``meta.yaml``, which says where its templates and configurations are.

A workspace is a folder with a folder ``forgather_workspace`` in it; what is there, every project below it finds.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.config.errors import ConfigError
from forgather_fn.config.functions import forgather_config_dir
from forgather_fn.config.parse import parse
from forgather_fn.config.plain import plain
from forgather_fn.config.render import render
from forgather_fn.config.sources import SHIPPED

META: Final = "meta.yaml"
WORKSPACE: Final = "forgather_workspace"
SYSTEM_PATH: Final = "system_path"
"""What allows a project to add folders to Python's search path."""
SEARCHDIR: Final = "searchdir"
"""What allows a project to have templates looked for outside of it and its workspace."""
ALLOWANCES: Final = frozenset({SYSTEM_PATH, SEARCHDIR})
"""What can be allowed to a project, beside the names that may be built."""

_KNOWN: Final = {
    "name": str,
    "description": str,
    "searchdir": list,
    "config_prefix": str,
    "default_config": str,
    "system_path": (list, str),
}


@attrs.frozen(kw_only=True)
class Project:
    """Where configurations and their templates are.

    Attributes:
        directory: Of the project.
        name: In words.
        description: In words.
        search_path: Where templates are looked for, in order.
        configs: Where, in those, configurations are.
        default: The configuration that is meant where none is named.
        variables: What its templates are given.
        system_path: What it asks to add to Python's search path.
    """

    directory: Path
    name: str = ""
    description: str = ""
    search_path: tuple[Path, ...] = ()
    configs: str = "configs"
    default: str | None = None
    variables: Mapping[str, Any] = attrs.field(factory=dict)
    system_path: tuple[str, ...] = ()

    def configurations(self) -> Iterator[str]:
        """Name the configurations of the project, sorted."""
        found = {
            path.relative_to(folder).as_posix()
            for folder in self.search_path
            if folder.is_relative_to(self.directory)
            for path in (folder / self.configs).glob("*.yaml")
        }
        yield from sorted(found)


def find(directory: Path, allow: Collection[str] = ()) -> Project | None:
    """Find the project that a folder is in: its own ``meta.yaml``, or that of the nearest folder around it.

    Args:
        directory: The folder.
        allow: As :func:`load` takes it.

    Raises:
        ConfigError: A ``meta.yaml`` cannot be used.
    """
    here = directory.resolve()
    for folder in (here, *here.parents):
        if (folder / META).is_file():
            return load(folder, allow)
        if (folder / WORKSPACE).is_dir():
            return None
    return None


def load(directory: Path, allow: Collection[str] = ()) -> Project:
    """Read a project.

    Args:
        directory: Of the project.
        allow: What the user trusts it with: with :data:`SEARCHDIR`, templates may be anywhere.

    Raises:
        ConfigError: Its ``meta.yaml`` cannot be used, has a key that is not known, or leads out of the project and its
            workspace without being allowed to.
    """
    directory = directory.resolve()
    workspace = next((f for f in (directory, *directory.parents) if (f / WORKSPACE).is_dir()), None)
    around = [] if workspace is None else [workspace / WORKSPACE]
    known = [directory, *([workspace] if workspace else []), *_user_templates(), SHIPPED]
    _check_inside(around, known, directory, allow)
    variables = {"project_dir": str(directory), "workspace_root": str(workspace or directory)}
    text = render(META, [directory, *around, *_user_templates()], variables)
    graph = parse(text)
    meta = {name: plain(graph, name) for name in graph.targets}
    _check_meta(meta, directory)
    folders = [directory / str(name) for name in meta.get("searchdir") or ["templates"]]
    _check_inside(folders, known, directory, allow)
    system_path = meta.get("system_path") or []
    return Project(
        directory=directory,
        name=meta.get("name") or directory.name,
        description=meta.get("description") or "",
        search_path=(*(folder.resolve() for folder in folders), *around, *_user_templates()),
        configs=meta.get("config_prefix") or "configs",
        default=meta.get("default_config"),
        variables=variables,
        system_path=tuple([system_path] if isinstance(system_path, str) else map(str, system_path)),
    )


def _check_meta(meta: Mapping[str, Any], directory: Path) -> None:
    """See that a ``meta.yaml`` has what is known, and names configurations that are in the search path."""
    for name, value in meta.items():
        if name not in _KNOWN:
            raise ConfigError(f"{directory / META}: {name!r} is not known; expected {', '.join(_KNOWN)}")
        if value is not None and not isinstance(value, _KNOWN[name]):  # type: ignore[arg-type]
            raise ConfigError(f"{directory / META}: {name} is {value!r}, a {type(value).__name__}")
    for name in ("config_prefix", "default_config"):
        place = Path(meta.get(name) or "")
        if place.is_absolute() or ".." in place.parts:
            raise ConfigError(
                f"{directory / META}: {name} is {meta[name]!r}: expected a path below a folder of searchdir"
            )


def _check_inside(folders: Collection[Path], known: Collection[Path], directory: Path, allow: Collection[str]) -> None:
    """Refuse folders, links followed, that are in none of those that are known, unless that is allowed."""
    outside = [one for one in folders if not any(one.resolve().is_relative_to(inner.resolve()) for inner in known)]
    if outside and SEARCHDIR not in allow:
        raise ConfigError(
            f"{directory / META}: templates are looked for in {', '.join(str(one.resolve()) for one in outside)}, "
            "outside of the project and its workspace, so that any file there could be read: add --allow "
            f"{SEARCHDIR} if you trust it"
        )


def _user_templates() -> list[Path]:
    folder = Path(forgather_config_dir()) / "templates"
    return [folder] if folder.is_dir() else []


def extend_system_path(project: Project, allow: Collection[str]) -> None:
    """Add what a project asks for to Python's search path, if that is allowed.

    Raises:
        ConfigError: It is not.
    """
    if not project.system_path:
        return
    if SYSTEM_PATH not in allow:
        raise ConfigError(
            f"{project.directory / META} adds {', '.join(project.system_path)} to Python's search path, from where "
            f"anything could be imported: add --allow {SYSTEM_PATH} if you trust it"
        )
    for name in project.system_path:
        folder = str((project.directory / name).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
