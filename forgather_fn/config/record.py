"""The record of a run: all that its configuration was, and what it ran on, in one file."""

import hashlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.checkpoint.catalog import RECORD, RECORD_LIMIT
from forgather_fn.checkpoint.system import read_file
from forgather_fn.config.arguments import arguments
from forgather_fn.config.dump import dump
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.functions import versions
from forgather_fn.config.git import git_state
from forgather_fn.config.graph import Graph
from forgather_fn.config.parse import parse
from forgather_fn.config.redact import REDACTED, redacted_command, redacted_graph, redacted_text, secrets_in, without
from forgather_fn.config.scalars import Value
from forgather_fn.config.secrets import is_secret
from forgather_fn.config.text import Text

NAME: Final = RECORD
"""Of the file, in a run directory and in each checkpoint."""
FORMAT: Final = "forgather-fn record"
VERSION: Final = 1
"""The version of the file's schema."""


@attrs.frozen(kw_only=True)
class Record:
    """What a run was made from. Secrets are not in it.

    Attributes:
        config: The configuration, as it was named on the command line.
        target: What was built.
        variables: Values of variables, for templates and for ``!var``.
        overrides: Arguments that were given by their paths, as text; the graph has them.
        templates: The source of each template that was used, by name.
        rendered: What they were rendered to.
        graph: What was built, as text that :func:`~forgather_fn.config.parse.parse` takes.
        arguments: The values in it, by their paths.
        hash: Of the graph, sha256.
        versions: Of Python, the libraries, the platform, and how many threads torch had.
        git: The revision and whether the tree was dirty, None where that cannot be told; None outside of a repository.
        command: The command line.
        redacted: Whether a secret was taken out.
    """

    config: str
    target: str
    variables: Mapping[str, Any]
    overrides: Mapping[str, str]
    templates: Mapping[str, str]
    rendered: str
    graph: str
    arguments: Mapping[str, Value]
    hash: str
    versions: Mapping[str, str]
    git: Mapping[str, Any] | None
    command: Sequence[str]
    redacted: bool


def record_of(
    text: str,
    graph: Graph,
    *,
    config: str,
    target: str = "main",
    variables: Mapping[str, Any],
    overrides: Mapping[str, str],
    command: Sequence[str],
    folder: Path,
) -> Record:
    """Put together the record of a run that is about to begin.

    Args:
        text: As rendered.
        graph: What will be built: parsed from the text, with the overrides.
        config: As it was named.
        target: What will be built.
        variables: For templates and for ``!var``.
        overrides: Arguments that were given by their paths.
        command: The command line.
        folder: In whose repository the configuration is.
    """
    looked_up = text.secrets if isinstance(text, Text) else frozenset()
    given = {str(value) for name, value in variables.items() if is_secret(name) and value is not None}
    secrets = secrets_in(graph) | looked_up | given
    clean = redacted_graph(graph, secrets)
    written = dump(clean)
    templates = text.templates if isinstance(text, Text) else {}
    known = {name: REDACTED if is_secret(name) else _clean(value, secrets) for name, value in variables.items()}
    return Record(
        config=config,
        target=target,
        variables=known,
        overrides={
            path: REDACTED if is_secret(path.rpartition(".")[2]) else redacted_text(value, secrets)
            for path, value in overrides.items()
        },
        templates={name: redacted_text(source, secrets) for name, source in templates.items()},
        rendered=redacted_text(str.__str__(text), secrets),
        graph=written,
        arguments=arguments(clean, target, {name: value for name, value in known.items() if name != "output_dir"}),
        hash=content_hash(clean),
        versions=surroundings(),
        git=git_state(folder),
        command=redacted_command(command, secrets),
        redacted=bool(secrets),
    )


def _clean(value: Any, secrets: Collection[str]) -> Any:
    return without(value, secrets) if isinstance(value, str) else value


def content_hash(graph: Graph) -> str:
    """Hash what a configuration says: sha256 of its dump, 64 hexadecimal digits."""
    return hashlib.sha256(dump(graph).encode("utf-8")).hexdigest()


def surroundings() -> dict[str, str]:
    """Name what the bits of a run depend on besides its configuration."""
    found = {**versions(), "platform": platform.platform(), "machine": platform.machine()}
    torch = sys.modules.get("torch")
    return found if torch is None else {**found, "threads": str(torch.get_num_threads())}


def write(run: Path, record: Record) -> Path:
    """Write the record of a run into its directory; one of another content that was there is kept beside it.

    Raises:
        ConfigError: The directory cannot be written to.
    """
    path = run / NAME
    text = json.dumps({"format": FORMAT, "version": VERSION, **attrs.asdict(record)}, indent=1, default=str)
    try:
        run.mkdir(parents=True, exist_ok=True)
        sibling = path.with_name(f".{NAME}.tmp")
        sibling.unlink(missing_ok=True)  # a link, which someone may have laid there, is not written through
        with open(os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # for the owner alone
            file.write(text.encode())
        if path.exists() and path.read_bytes() != text.encode():
            numbers = itertools.count(1)
            path.rename(next(one for n in numbers if not os.path.lexists(one := run / f"record-{n}.json")))
        sibling.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return path


def read(path: str | Path) -> Record:
    """Read the record of a run, by its directory, one of its checkpoints, or the file.

    Raises:
        ConfigError: There is none, it is damaged, or of a newer version.
    """
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    try:
        with read_file(file) as opened:
            fields = json.loads(opened.read(RECORD_LIMIT))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; expected a run of forgather train") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a record of a run: {error}") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ConfigError(f"{file} is not a record of a run")
    version = fields.pop("version", None)
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(f"{file} has version {version!r} of the schema; this library reads up to {VERSION}")
    names = {field.name for field in attrs.fields(Record)}
    if names - fields.keys():
        raise ConfigError(f"{file} lacks {', '.join(sorted(names - fields.keys()))}")
    odd = [name for name, is_right in _FIELDS.items() if not is_right(fields[name])]
    if odd:
        raise ConfigError(f"{file} is not a record of a run: {', '.join(odd)} cannot be what a run was made from")
    record = Record(**{name: fields[name] for name in names})
    if content_hash(parse(str(record.graph))) != record.hash:
        raise ConfigError(f"{file}: its graph was changed: the hash differs")
    return record


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _has(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Tell a mapping whose values are right; its keys are texts, as in all JSON."""
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_git(value: Any) -> bool:
    return value is None or (_has(_is_plain)(value) and value.keys() >= {"revision", "dirty"})


_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("config", "target", "rendered", "graph", "hash"), _is_text),
    **dict.fromkeys(("overrides", "templates", "versions"), _has(_is_text)),
    "variables": lambda value: isinstance(value, dict),
    "arguments": _has(_is_plain),
    "git": _is_git,
    "command": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "redacted": lambda value: isinstance(value, bool),
}
"""What the fields of a record are, in JSON."""
