"""Writing YAML, by PyYAML's emitter."""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import yaml
from yaml import events as ev

from forgather_fn.config.errors import ConfigError
from forgather_fn.config.scalars import Value, scalar, written

_WIDTH: Final = 10**9


def inline(value: Any) -> str:
    """Write a plain value on one line.

    Raises:
        ConfigError: It is, or holds, something else than scalars, sequences and mappings.
    """
    return emitted(_events([value])).strip()[1:-1]  # inside of a list, so that it can stand inside of one


def emitted(events: Iterable[ev.Event]) -> str:
    """Write the events of one document."""
    start = [ev.StreamStartEvent(), ev.DocumentStartEvent(explicit=False)]
    end = [ev.DocumentEndEvent(explicit=False), ev.StreamEndEvent()]
    text: str = yaml.emit([*start, *events, *end], width=_WIDTH, allow_unicode=True)
    return text


def scalar_event(value: Value, *, anchor: str | None = None, tag: str | None = None) -> ev.ScalarEvent:
    """Give the event of a scalar that is read back as it is: strings that look like something else are quoted."""
    text = written(value)
    if not isinstance(value, str):
        return ev.ScalarEvent(anchor, tag, (tag is None, False), text)
    plain = isinstance(scalar(text), str) and text != "<<"
    style = None if text.isprintable() else '"'
    return ev.ScalarEvent(anchor, tag, (plain and tag is None, tag is None), text, style=style)


def _events(value: Any) -> Iterator[ev.Event]:
    if value is None or isinstance(value, bool | int | float | str):
        yield scalar_event(value)
    elif isinstance(value, dict):
        yield ev.MappingStartEvent(None, None, True, flow_style=True)
        for key, item in value.items():
            yield from _events(key)
            yield from _events(item)
        yield ev.MappingEndEvent()
    elif isinstance(value, list | tuple):
        yield ev.SequenceStartEvent(None, None, True, flow_style=True)
        for item in value:
            yield from _events(item)
        yield ev.SequenceEndEvent()
    else:
        raise ConfigError(f"cannot write {type(value).__name__} as YAML: expected scalars, lists and mappings of them")
