"""What the commands have in common: which configuration, with which settings, and what may be built."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgather_fn.config.dynamic import add_options, declared, settings_of
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.load import Loaded, load
from forgather_fn.config.project import SEARCHDIR


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which configuration is meant; what it declares becomes options too."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a file, or the name of one (forgather ls)")
    parser.add_argument("-t", "--template", metavar="CONFIG", help="the same; it may also stand before the command")
    parser.add_argument(
        "-p", "--project-dir", type=Path, metavar="DIR", help="where the project is (default: around here)"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="set a variable, or an argument by its path, such as main.learning_rate=1e-3",
    )
    parser.set_defaults(declare=_declare, declared=[])


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add the option that admits names."""
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="let the configuration build package.module:Name, or whatever is defined in a package; searchdir and "
        "system_path let its project look for templates and modules elsewhere",
    )


def add_allow_folders(parser: argparse.ArgumentParser) -> None:
    """Add the option that admits folders of templates, for commands that build nothing."""
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        choices=[SEARCHDIR],
        help="let the project look for templates outside of it and its workspace",
    )


def settings(items: Sequence[str]) -> dict[str, str]:
    """Split ``NAME=VALUE`` items.

    Raises:
        ConfigError: One is not of this form.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {item}: expected NAME=VALUE; the configuration stands before --set")
        found[name] = value
    return found


def all_settings(options: argparse.Namespace) -> dict[str, str]:
    """Join what ``--set`` and the configuration's own options say."""
    return {**settings_of(options, options.declared), **settings(options.settings)}


def loaded(options: argparse.Namespace) -> Loaded:
    """Load the configuration that a command line names."""
    return load(named(options), all_settings(options), project_dir=options.project_dir, allow=options.allow)


def named(options: argparse.Namespace) -> str:
    """Name the configuration; empty for a project's default.

    Raises:
        ConfigError: Two are named; or none is, and there is no project either.
    """
    if options.config and options.template:
        raise ConfigError(f"which configuration: {options.config}, or -t {options.template}? Name one")
    name = options.config or options.template
    if not name and options.project_dir is None and not Path("meta.yaml").is_file():
        raise ConfigError("which configuration? Name it: forgather COMMAND CONFIG; forgather ls lists those there are")
    return str(name or "")


def _declare(parser: argparse.ArgumentParser, options: argparse.Namespace, unknown: Sequence[str]) -> None:
    """Add the options that the configuration declares.

    It is rendered for that with what is known: what looks like one of its options gives the variable of that name.
    """
    name = options.template or options.config  # with -t, what was taken for a name is the value of an unknown option
    if not name:
        return
    guessed: dict[str, Any] = {}
    for flag, value in zip(unknown, [*unknown[1:], ""], strict=False):
        if flag.startswith("--"):
            guessed[flag[2:].partition("=")[0].replace("-", "_")] = flag.partition("=")[2] or value
    first = load(
        name,
        {name: value for name, value in settings(options.settings).items() if "." not in name and "[" not in name},
        project_dir=options.project_dir,
        defaults=guessed,
        allow=options.allow,
    )
    found = declared(first.graph)
    if found:
        add_options(parser, found)
    parser.set_defaults(declared=found)
