"""``forgather ls``: the configurations that there are."""

import argparse
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from forgather_fn.config import project as projects
from forgather_fn.config.commands.common import add_allow_folders
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.load import OUTPUT, load
from forgather_fn.config.plain import plain
from forgather_fn.config.sources import SHIPPED
from forgather_fn.terminal import printable


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather ls`` to a parser, and give what lists configurations."""
    parser.add_argument(
        "-p", "--project-dir", type=Path, default=Path(), metavar="DIR", help="where to look (default: here)"
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="look for projects in all folders below")
    add_allow_folders(parser)
    parser.epilog = "example: forgather ls -r"

    def execute(options: argparse.Namespace) -> int:
        for title, names, folder in _groups(options.project_dir, options.recursive, options.allow):
            print(printable(title))
            width = max(map(len, names), default=0)
            for name in names:
                print(printable(f"  {name:{width}}  {_described(name, folder, options.allow)}".rstrip()))
        return 0

    return execute


def _groups(directory: Path, recursive: bool, allow: Collection[str]) -> Iterator[tuple[str, list[str], Path | None]]:
    metas = sorted(directory.rglob(projects.META)) if recursive else []
    folders = [path.parent for path in metas] or [directory]
    for folder in folders:
        try:
            project = projects.find(folder, allow)
        except ConfigError as error:
            yield f"{folder.resolve()}: cannot be read: {error.problem.splitlines()[0]}", [], None
            continue
        if project is not None:
            yield f"{project.directory}: {project.name}", list(project.configurations()), project.directory
        elif files := sorted(path for path in folder.glob("*.yaml") if path.name != projects.META):
            yield f"{folder.resolve()}", [str(path) for path in files], None
    shipped = sorted(path.relative_to(SHIPPED).as_posix() for path in (SHIPPED / "projects").glob("*.yaml"))
    yield "with the library", shipped, None


def _described(name: str, folder: Path | None, allow: Collection[str]) -> str:
    try:
        graph = load(name, project_dir=folder, allow=allow).graph
        meta = plain(graph, "meta", {OUTPUT: ""}) if "meta" in graph.targets else {}
    except ConfigError as error:
        return f"(cannot be read: {error.problem.splitlines()[0]})"
    given = meta if isinstance(meta, dict) else {}
    return str(given.get("config_description") or given.get("config_name") or "")
