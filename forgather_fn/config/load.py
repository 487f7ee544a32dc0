"""Loading: from what a command line says to a graph that is ready to be built."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from forgather_fn.config import project as projects
from forgather_fn.config.arguments import arguments, replaced
from forgather_fn.config.build import build
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.graph import Graph, Var
from forgather_fn.config.hints import nearest
from forgather_fn.config.parse import parse
from forgather_fn.config.plain import plain_text
from forgather_fn.config.project import Project
from forgather_fn.config.record import Record, record_of
from forgather_fn.config.redact import REDACTED
from forgather_fn.config.render import render
from forgather_fn.config.sources import SHIPPED
from forgather_fn.config.text import Text

OUTPUT = "output_dir"
"""The variable that every configuration is given: the run directory."""


@attrs.frozen(kw_only=True)
class Loaded:
    """A configuration that was read.

    Attributes:
        config: As it was named.
        text: What it renders to.
        graph: What it says, with the overrides.
        variables: The values of variables, for templates and for ``!var``.
        overrides: Arguments that were given by their paths.
        folder: Where the configuration is.
        project: That it belongs to.
    """

    config: str
    text: str
    graph: Graph
    variables: Mapping[str, Any]
    overrides: Mapping[str, str] = attrs.field(factory=dict)
    folder: Path = attrs.field(factory=Path)
    project: Project | None = None

    def build(self, target: str, allow: Collection[str]) -> Any:
        """Build a target of it."""
        if self.project is not None:
            projects.extend_system_path(self.project, allow)
        return build(self.graph, target, self.variables, allow=set(allow) - projects.ALLOWANCES)

    def record(self, target: str, command: Sequence[str]) -> Record:
        """Put together the record of a run of it."""
        return record_of(
            self.text,
            self.graph,
            config=self.config,
            target=target,
            variables=self.variables,
            overrides=self.overrides,
            command=command,
            folder=self.folder,
        )


def load(
    config: str,
    settings: Mapping[str, str] = MappingProxyType({}),
    *,
    project_dir: Path | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    allow: Collection[str] = (),
) -> Loaded:
    """Render and parse a configuration.

    Args:
        config: The path of a file, or the name of one of the project's configurations or of a shipped template.
        settings: Values as text: of variables by their names, of arguments by their paths (which have a dot).
        project_dir: Where the project is looked for; None for the configuration's folder, or the current one.
        defaults: Values of variables that need not be used by the configuration.
        allow: What the user trusts its project with, as :func:`forgather_fn.config.project.load` takes it.

    Raises:
        ConfigError: It cannot be read, or a setting is not one that it has.
    """
    file, project = _located(config, project_dir, allow)
    overrides = {name: text for name, text in settings.items() if "." in name or "[" in name}
    given = {name: plain_text(name, text) for name, text in settings.items() if name not in overrides}
    variables = {OUTPUT: str(Path("runs") / Path(config).stem), **defaults, **given}
    search = () if project is None else project.search_path
    known = {} if project is None else project.variables
    text = render(file, search, {**known, **variables})
    graph = parse(text)
    _check_used(set(given) - {OUTPUT}, text.variables, graph)
    for path, value in overrides.items():
        graph = replaced(graph, path, value)
    folder = file.resolve().parent if isinstance(file, Path) and file.is_file() else Path.cwd()
    return Loaded(
        config=config,
        text=text,
        graph=graph,
        variables=variables,
        overrides=overrides,
        folder=folder,
        project=project,
    )


def again(record: Record, settings: Mapping[str, str], output: str) -> Loaded:
    """Take the configuration of a run that was made, from its record.

    Args:
        record: Of the run.
        settings: Values for secrets that were taken out of it; and others, which make it another run.
        output: The directory of the new run.

    Raises:
        ConfigError: A secret is missing.
    """
    graph = parse(record.graph)
    overrides = {name: text for name, text in settings.items() if "." in name or "[" in name}
    given = {name: plain_text(name, text) for name, text in settings.items() if name not in overrides}
    variables = {**record.variables, **given, OUTPUT: output}
    used = {node.variable for node in graph.nodes if isinstance(node, Var)}
    for name in given.keys() - used - {OUTPUT}:
        raise ConfigError(f"{name} is no variable of what was built; arguments have paths, such as main.{name}")
    for path, value in overrides.items():
        graph = replaced(graph, path, value)
    missing = [name for name in used if variables.get(name) == REDACTED]
    missing += [path for path, value in arguments(graph, record.target).items() if REDACTED in str(value)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} was secret and is not in the record: give it with --set NAME=VALUE")
    text = Text(record.rendered, templates=record.templates)
    return Loaded(config=record.config, text=text, graph=graph, variables=variables, overrides=overrides)


def _located(config: str, project_dir: Path | None, allow: Collection[str]) -> tuple[Path | str, Project | None]:
    file = Path(config)
    if file.is_file() and project_dir is None:
        return file, projects.find(file.parent, allow)
    project = projects.find(project_dir or Path.cwd(), allow)
    if project is not None:
        name = config or project.default or ""
        for candidate in (name, f"{project.configs}/{name}", f"{project.configs}/{name}.yaml"):
            if candidate and any((folder / candidate).is_file() for folder in project.search_path):
                return candidate, project
    for candidate in (config, f"{config}.yaml"):
        if config and (SHIPPED / candidate).is_file():
            return candidate, project
    if file.is_file():
        return file, project
    where = f"the project {project.directory}" if project else "a project here (there is no meta.yaml)"
    near = nearest(config, _names(project))
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(
        f"there is no configuration {config!r}: {hint}expected a file, or one of {where}, or one that comes with the "
        "library; see forgather ls"
    )


def _names(project: Project | None) -> list[str]:
    """List what a configuration of the library, of a project, or of this folder can be called."""
    names = [path.relative_to(SHIPPED).as_posix() for path in (SHIPPED / "projects").glob("*.yaml")]
    names += [path.name for path in Path.cwd().glob("*.yaml")]
    return [*names, *(project.configurations() if project else ())]


def _check_used(names: Collection[str], referred: Collection[str], graph: Graph) -> None:
    used = {node.variable for node in graph.nodes if isinstance(node, Var)} | set(referred)
    for name in sorted(names):
        if name not in used:
            near = nearest(name, used)
            hint = f"did you mean {near}?" if near else f"to set an argument, give its path, such as main.{name}"
            raise ConfigError(f"no template refers to the variable {name}: {hint}")
