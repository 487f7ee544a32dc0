"""Rendering: templates to text."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from jinja2 import TemplateError, TemplateNotFound, TemplateSyntaxError, UndefinedError

from forgather_fn.config.errors import ConfigError, Position
from forgather_fn.config.functions import FILTERS, Surroundings, global_names
from forgather_fn.config.hints import nearest
from forgather_fn.config.sandbox import Sandbox
from forgather_fn.config.sources import SHIPPED, Sources
from forgather_fn.config.text import Text

STRING = "<template>"
"""The name of a template that is given as a string."""


def render(
    template: str | Path,
    search_path: Sequence[str | Path] = (),
    variables: Mapping[str, Any] = MappingProxyType({}),
    *,
    clock: Callable[[], float] = time.time,
    environ: Mapping[str, str] | None = None,
) -> Text:
    r"""Render a template.

    Args:
        template: A file by its path, or by its name in the search path; or, if it has several lines or is neither, a
            template itself.
        search_path: Folders that templates are looked for in; a file's own folder comes first, the templates that come
            with the library last. Nothing outside them is read.
        variables: What templates may refer to. They hide global functions of the same name.
        clock: Gives the time, in seconds since 1970, that the functions of time tell during the whole rendering.
        environ: What ``getenv`` looks up; None for the process's environment.

    Returns:
        The text. Its attributes say where each line came from, and which templates were used.

    Raises:
        ConfigError: A template is not found, not valid, refers to a variable that is not there, or takes too much.

    Example:
        >>> print(render("-- set peak = 1e-3\nlr: {{ peak / 2 }}"))
        lr: 0.0005
    """
    if not isinstance(template, str | Path):
        raise ConfigError(f"render takes a template's text, name or path, got {type(template).__name__}")
    if isinstance(search_path, str | bytes) or not isinstance(search_path, Sequence):
        raise ConfigError(f"render: search_path={search_path!r}: expected a list of folders")
    if not isinstance(variables, Mapping):
        raise ConfigError(f"render: variables={variables!r}: expected a mapping of names to values")
    sources, name = _opened(template, search_path)
    surroundings = Surroundings(now=clock(), environ=os.environ if environ is None else environ)
    sandbox = Sandbox(sources, FILTERS)
    known = {**global_names(surroundings), "hostname": socket.gethostname(), **variables}
    try:
        text = sandbox.get_template(name).render(known)
    except ConfigError as error:
        told = ConfigError(error.problem, error.position or _last_place(error, sandbox), error.key)
        raise sandbox.in_vain(ended=False) or told from error
    except (TemplateError, RecursionError, MemoryError, SyntaxError, ArithmeticError, TypeError, ValueError) as error:
        raise sandbox.in_vain(ended=False) or _explained(error, sandbox, known) from error
    except (AttributeError, LookupError, OSError, AssertionError) as error:
        raise sandbox.in_vain(ended=False) or _explained(error, sandbox, known) from error
    if dropped := sandbox.in_vain(ended=True):
        raise dropped
    assert isinstance(text, Text)
    files = MappingProxyType(sources.files)
    return Text(text, text.origins, files, surroundings.secrets, sandbox.names, sources.references)


def _opened(template: str | Path, search_path: Sequence[str | Path]) -> tuple[Sources, str]:
    folders = [Path(folder) for folder in search_path]
    path = Path(template) if isinstance(template, Path) or "\n" not in template else None
    if path is not None and _is_file(path) and (isinstance(template, Path) or path.is_absolute() or not folders):
        return Sources([path.parent, *folders, SHIPPED]), path.name
    sources = Sources([*folders, SHIPPED])
    if path is not None and any(_is_file(folder / path) for folder in sources.path):
        return sources, str(template)
    if path is not None and (isinstance(template, Path) or str(path).endswith((".yaml", ".yml"))):
        return sources, str(template)  # whose loading says that it is not there, and where it was looked for
    sources.add(STRING, str(template))
    return sources, STRING


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _explained(error: Exception, sandbox: Sandbox, known: Mapping[str, Any]) -> ConfigError:
    place = _last_place(error, sandbox)
    if isinstance(error, TemplateSyntaxError):
        if error.name in sandbox.sources.loaded:
            offset = sandbox.sources.loaded[error.name].line - 1
            place = sandbox.place(error.name, error.lineno + offset)
        return ConfigError(f"not a valid template: {error.message}", place)
    if isinstance(error, TemplateNotFound):
        return ConfigError(f"template {error.name!r} was not found", place)
    if isinstance(error, UndefinedError) and str(error.message).startswith("there is no parent block"):
        return ConfigError(
            f"{str(error.message).rstrip('.')}: super() is its text in the template that this one extends", place
        )
    if isinstance(error, UndefinedError):
        return ConfigError(f"{error.message}{_near(str(error.message), known)}", place)
    if isinstance(error, RecursionError):
        return ConfigError("templates, or expressions in one, lie in each other too deeply: is there a circle?", place)
    return ConfigError(f"{type(error).__name__}: {error}", place)


def _near(message: str, known: Mapping[str, Any]) -> str:
    name = message.partition("'")[2].partition("'")[0]
    if not message.endswith("is undefined") or " " in name:
        return ""
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else f"; give it with --set {name}=VALUE, or in the template"


def _last_place(error: BaseException, sandbox: Sandbox) -> Position | None:
    """Find the innermost line of a template in an error's traceback, which Jinja gives the templates' lines."""
    trace: TracebackType | None = error.__traceback__
    place = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name in sandbox.sources.loaded:
            offset = sandbox.sources.loaded[name].line - 1
            place = sandbox.place(name, trace.tb_lineno + offset)
        trace = trace.tb_next
    return place
