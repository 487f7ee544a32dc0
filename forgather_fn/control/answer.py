"""What a job answers, held against what a job can say: something else may listen where one is looked for."""

from collections.abc import Callable, Mapping
from typing import Any, Final

Check = Callable[[Any], Any]
"""Give a value as it is meant; a ``ValueError`` where it is none."""


def status_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Read a status; what is not known there, or not said, is None.

    Raises:
        ValueError: A part of it is not what it should be, or the job is not named.

    Example:
        >>> status_of({"job": "a", "step": 3, "loss": "nan"})["loss"]
        nan
        >>> status_of({"job": "a", "step": "many"})
        Traceback (most recent call last):
        ValueError: its 'step' is 'many'
    """
    return {**found, **_checked(found, _STATUS), "job": _field(found, "job", _text)}


def reply_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Read what was done: the command, and its step, unless it was only asked for.

    Raises:
        ValueError: A part of it is not what it should be.
    """
    needed = {} if found.get("accepted") is True else {"step": _field(found, "step", _integer)}
    return {**found, **_checked(found, _REPLY), **needed, "command": _field(found, "command", _text)}


def _checked(found: Mapping[str, Any], parts: Mapping[str, Check]) -> dict[str, Any]:
    return {name: _field(found, name, _optional(check)) for name, check in parts.items() if name in found}


def _field(found: Mapping[str, Any], name: str, check: Check) -> Any:
    try:
        return check(found.get(name))
    except ValueError:
        raise ValueError(f"its {name!r} is {str(found.get(name))[:60]!r}") from None


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError
    return value


def _number(value: Any) -> float:
    """Take a number, or the name of one that JSON has not."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, float) else _integer(value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    return [_text(one) for one in value]


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError
    return {name: _number(one) for name, one in value.items()}


def _checkpoint(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return {"path": _text(value.get("path")), "step": _integer(value.get("step")), "age": _number(value.get("age"))}


_STATUS: Final[Mapping[str, Check]] = {
    **dict.fromkeys(("run", "host", "last_error", "ended"), _text),
    **dict.fromkeys(("pid", "world_size", "step", "started", "horizon", "samples", "metrics_step"), _integer),
    **dict.fromkeys(("since", "epoch", "loss", "learning_rate", "remaining", "estimated_end"), _number),
    **dict.fromkeys(("steps_per_second", "samples_per_second"), _number),
    "metrics": _numbers,
    "waiting": _texts,
    "checkpoint": _checkpoint,
}
_REPLY: Final[Mapping[str, Check]] = {"paths": _texts, "results": _numbers, "checkpoint": _text}
