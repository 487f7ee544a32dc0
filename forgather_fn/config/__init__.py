"""Training from templates: ``render`` to text, ``parse`` to a graph, ``build`` objects.

    text   = render(template, search_path, variables)
    graph  = parse(text)
    object = build(graph, target, context, allow=...)

Each is a pure function of its arguments; only ``build`` imports and calls what a configuration names.
"""

from forgather_fn.config.build import build as build
from forgather_fn.config.dump import dump as dump
from forgather_fn.config.errors import ConfigError as ConfigError
from forgather_fn.config.errors import Position as Position
from forgather_fn.config.graph import Graph as Graph
from forgather_fn.config.parse import parse as parse
from forgather_fn.config.python import to_python as to_python
from forgather_fn.config.render import render as render
