"""``forgather pp | graph | targets | code | construct | trefs CONFIG``: a configuration at each stage."""

import argparse
import json
import pprint
from collections.abc import Callable

from forgather_fn.config.commands.common import add_allow, add_allow_folders, add_source, loaded
from forgather_fn.config.dump import dump
from forgather_fn.config.python import to_python
from forgather_fn.config.text import Text
from forgather_fn.terminal import printable

Execute = Callable[[argparse.Namespace], int]


def pp(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather pp``; give what prints a rendered configuration."""
    add_source(parser)
    add_allow_folders(parser)
    parser.add_argument("--origins", action="store_true", help="show for each line where it came from")
    parser.epilog = "example: forgather pp projects/demo.yaml"

    def execute(options: argparse.Namespace) -> int:
        text = loaded(options).text
        if options.origins and isinstance(text, Text):
            places = [f"{one.template}:{one.line}" for one in text.origins]
            width = max(map(len, places), default=0)
            for place, line in zip(places, str.__str__(text).split("\n"), strict=True):
                print(f"{place:{width}} | {line}")
        else:
            print(text.strip("\n"))  # templates leave empty lines where their statements were
        return 0

    return execute


def graph(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather graph``; give what prints the graph of a configuration."""
    add_source(parser)
    add_allow_folders(parser)
    parser.add_argument(
        "--format",
        choices=("yaml", "python", "repr", "none"),
        default="yaml",
        help="how; none prints nothing, and tells errors (default: yaml)",
    )
    parser.epilog = "example: forgather graph projects/demo.yaml --format yaml"

    def execute(options: argparse.Namespace) -> int:
        found = loaded(options).graph
        if options.format == "yaml":
            print(dump(found), end="")
        elif options.format == "python":
            print(to_python(found), end="")
        elif options.format == "repr":
            for ref, node in enumerate(found.nodes):
                print(f"{ref:4} {node}")
            print(dict(found.targets))
        return 0

    return execute


def targets(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather targets``; give what lists what can be built."""
    add_source(parser)
    add_allow_folders(parser)
    parser.epilog = "example: forgather targets projects/demo.yaml"

    def execute(options: argparse.Namespace) -> int:
        print(*map(printable, loaded(options).graph.targets), sep="\n")
        return 0

    return execute


def code(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather code``; give what prints a target as Python source."""
    add_source(parser)
    add_allow_folders(parser)
    parser.add_argument(
        "--target", default="main", metavar="TARGET", help="which (forgather targets lists them; default: %(default)s)"
    )
    parser.epilog = "example: forgather code projects/demo.yaml --target main"

    def execute(options: argparse.Namespace) -> int:
        print(to_python(loaded(options).graph, [options.target]), end="")
        return 0

    return execute


def construct(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather construct``; give what builds a target and shows it."""
    add_source(parser)
    add_allow(parser)
    parser.add_argument(
        "--target", default="main", metavar="TARGET", help="which (forgather targets lists them; default: %(default)s)"
    )
    parser.add_argument("--call", action="store_true", help="call what was built, and show what that gives")
    parser.epilog = "example: forgather construct projects/demo.yaml --target meta"

    def execute(options: argparse.Namespace) -> int:
        made = loaded(options).build(options.target, options.allow)
        pprint.pprint(made() if options.call else made, sort_dicts=False)
        return 0

    return execute


def trefs(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather trefs``; give what lists the templates that a configuration uses."""
    add_source(parser)
    add_allow_folders(parser)
    formats = {"files": files, "md": markdown, "tree": tree, "dot": dot}
    parser.add_argument(
        "--format",
        choices=formats,
        default="files",
        help="a list, in Markdown, who asks for whom, or for Graphviz (default: files)",
    )
    parser.epilog = "example: forgather trefs projects/demo.yaml --format tree"

    def execute(options: argparse.Namespace) -> int:
        text = loaded(options).text
        assert isinstance(text, Text)
        print(*map(printable, formats[options.format](text)), sep="\n")
        return 0

    return execute


def files(text: Text) -> list[str]:
    """List the files that were used."""
    return list(text.templates)


def markdown(text: Text) -> list[str]:
    """List the files that were used, in Markdown."""
    return [f"- `{name}`" for name in text.templates]


def tree(text: Text) -> list[str]:
    """Draw which template asks for which; one that was drawn before is not drawn again."""
    below: dict[str, list[str]] = {}
    for parent, name in text.references:
        below.setdefault(parent, []).append(name)
    lines: list[str] = []
    drawn: set[str] = set()

    def draw(name: str, depth: int) -> None:
        lines.append(f"{'  ' * depth}{name}")
        if name not in drawn:
            drawn.add(name)
            for one in below.get(name, []):
                draw(one, depth + 1)

    draw(next(iter(text.templates)), 0)
    return lines


def dot(text: Text) -> list[str]:
    """Write which template asks for which in the language of Graphviz."""
    edges = [f"  {json.dumps(parent)} -> {json.dumps(name)};" for parent, name in text.references]
    return ["digraph templates {", *edges, "}"]
