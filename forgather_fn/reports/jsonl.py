"""Rows as lines of JSON."""

import json
import math
import os
from pathlib import Path
from typing import BinaryIO, TypeAlias

from forgather_fn.reports.path import checked, content_of, naming, replace
from forgather_fn.reports.row import Row, Sink, opened

StrPath: TypeAlias = str | os.PathLike[str]

_HEAD = b'{"step": '


def jsonl(path: StrPath) -> Sink:
    """Append each row to a file as one line: an object of step, samples, epoch (where known), seconds, and the values.

    A float that JSON has no number for is the string ``"nan"``, ``"inf"`` or ``"-inf"``, so that every strict parser
    reads the file, and :func:`read` gives the same floats back. Every line is flushed.

    The first row of an attempt settles what is already there: lines beyond ``row.started`` belong to an attempt that
    was given up, and go (so that a run that starts again from step 0 starts the file again); so does a last line that a
    kill cut off. The file is replaced as a whole, so that a kill in between loses nothing.

    Args:
        path: A file; created with its parent directories at the first row.

    Raises:
        ValueError: At the first row: the path cannot be written to, or holds something else than such lines.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     log = jsonl(f"{directory}/log.jsonl")
        ...     log(Row(step=1, samples=32, seconds=0.5, values={"loss": math.inf}))
        ...     log.close()
        ...     read(f"{directory}/log.jsonl")
        [{'step': 1, 'samples': 32, 'seconds': 0.5, 'loss': inf}]
    """
    expected = "a file that can be written, or a new one in a directory that can"
    checked(path, "jsonl")

    def open(row: Row) -> BinaryIO:
        # Replacing a link would cut it from the file that it stands for.
        real = Path(os.path.realpath(path))
        with naming(path, expected):
            real.parent.mkdir(parents=True, exist_ok=True)
            _supersede(real, row.started)
            return real.open("ab")

    def write(file: BinaryIO, row: Row) -> None:
        line = _line(row)
        with naming(path, expected):
            file.write(line)
            file.flush()

    def close(file: BinaryIO) -> None:
        with naming(path, expected):
            file.close()

    return opened(f"jsonl({os.fspath(path)!r})", open, write, close)


def read(path: StrPath) -> list[dict[str, float]]:
    """Read the rows of a file that :func:`jsonl` wrote, or is writing: a last line without its end is left out.

    Returns:
        One mapping for each line, in order, as written; nan and infinities are floats again.

    Raises:
        ValueError: The file cannot be read, or a line is not a row; the message has its number.
    """
    with naming(checked(path, "read"), "a file of rows to read"):
        content = content_of(path)
    return [record for _, record in _lines(path, content)]


def _line(row: Row) -> bytes:
    fields: dict[str, float | None] = {
        "step": row.step,
        "samples": row.samples,
        "epoch": row.epoch,
        "seconds": row.seconds,
        **row.values,
    }
    known = {name: value if math.isfinite(value) else str(value) for name, value in fields.items() if value is not None}
    return json.dumps(known, allow_nan=False).encode() + b"\n"


def _lines(path: StrPath, content: bytes) -> list[tuple[bytes, dict[str, float]]]:
    """Pair each line with its record, without the last one where it was cut."""
    *ended, rest = content.split(b"\n")
    whole = ended if _is_cut(rest) else [*ended, rest]
    return [(line, _record(path, number, line)) for number, line in enumerate(whole, start=1)]


def _is_cut(rest: bytes) -> bool:
    """Tell the beginning of a line from a whole one that lacks its end, and from the text of another file."""
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return rest.startswith(_HEAD) or _HEAD.startswith(rest)
    return False


def _record(path: StrPath, number: int, line: bytes) -> dict[str, float]:
    try:
        fields = json.loads(line)
        if isinstance(fields, dict) and type(fields.get("step")) is int:
            known = {name: float(value) for name, value in fields.items()}  # an integer must fit a float as well
            return {name: fields[name] if isinstance(fields[name], int) else value for name, value in known.items()}
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass
    shown = line[:80].decode(errors="replace")
    place = f"{os.fspath(path)!r}, line {number}"
    raise ValueError(f"{place}: expected a JSON object with an integer step, all its values numbers, got {shown!r}")


def _supersede(path: Path, started: int) -> None:
    """Keep the whole lines up to a step, byte by byte."""
    try:
        content = content_of(path)
    except FileNotFoundError:
        return
    kept = b"".join(line + b"\n" for line, record in _lines(path, content) if record["step"] <= started)
    if kept == content:
        return
    replace(path, kept)
