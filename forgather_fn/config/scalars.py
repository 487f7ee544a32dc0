"""Plain YAML scalars and what they mean: as PyYAML reads them, but for what nobody means.

``1e-5`` is a number. Dates and ``1:30`` are strings.
"""

import re
from typing import Final

Value = None | bool | int | float | str

_BOOL: Final = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_INT: Final = re.compile(r"[-+]?(?:0b_*[01][01_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0o?_*[0-7][0-7_]*|0|[1-9][0-9_]*)")
_FLOAT: Final = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_SPECIAL: Final = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_LONGEST: Final = 4_000
"""Digits of a number; Python refuses to read longer ones."""


def scalar(text: str) -> Value:
    """Give the meaning of a plain scalar.

    Example:
        >>> [scalar(text) for text in ("1e-5", "1_000", "yes", "~", "0x10", "1:30", "2024-01-01", "-.inf")]
        [1e-05, 1000, True, None, 16, '1:30', '2024-01-01', -inf]
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in _BOOL and text in (text.lower(), text.upper(), text.capitalize()):
        return _BOOL[text.lower()]
    if len(text) > _LONGEST or text[0] not in "+-.0123456789":
        return text
    if _INT.fullmatch(text):
        return _integer(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if special := _SPECIAL.fullmatch(text):
        sign, word = special.groups()
        return float(f"{sign}{word}") if word.lower() == "inf" or not sign else text
    return text


def _integer(text: str) -> int:
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    if digits[:2] in ("0b", "0x", "0o"):
        return sign * int(digits, 0)
    if digits[0] == "0" and len(digits) > 1:  # YAML 1.1: 0644 is octal
        return sign * int(digits, 8)
    return sign * int(digits)


def written(value: Value) -> str:
    """Write a value so that :func:`scalar` gives it back; a string as it is.

    Example:
        >>> [written(value) for value in (None, True, 1e-5, float("inf"), "x")]
        ['null', 'true', '1.0e-05', '.inf', 'x']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(float(value))
        if text in ("inf", "-inf", "nan"):
            return text.replace("inf", ".inf").replace("nan", ".nan")
        return text if "." in text else text.replace("e", ".0e")  # which strict YAML 1.1 readers take as well
    return str(value)
