"""What a measurement gives: a table to read, and the numbers behind it."""

from typing import Any

import attrs


@attrs.frozen
class Reach:
    """A goal: what a measured number is to be at most."""

    what: str
    measured: float
    limit: float

    def __str__(self) -> str:
        verdict = "reached" if self.measured <= self.limit else "MISSED"
        return f"{self.what}: {self.measured:.3f}, to be at most {self.limit:g}: {verdict}"


@attrs.frozen(kw_only=True)
class Table:
    """One row of the bench, side by side.

    Attributes:
        title: What was measured.
        notes: What a reader must know, and what was left out.
        columns: The head.
        lines: The cells, as text.
        reach: Goals.
        results: What the cells were made of, for JSON.
    """

    title: str
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    reach: tuple[Reach, ...] = ()
    results: tuple[Any, ...] = ()

    def text(self) -> str:
        """Write it as Markdown."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.lines, strict=True)]
        rows = [self.columns, tuple("-" * width for width in widths), *self.lines]
        table = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
        return "\n".join([f"## {self.title}", "", *self.notes, "", *table, "", *map(str, self.reach)]).rstrip() + "\n"

    def as_json(self) -> dict[str, Any]:
        """Give it for writing."""
        reach = [{"what": r.what, "measured": r.measured, "limit": r.limit} for r in self.reach]
        return {"title": self.title, "notes": self.notes, "reach": reach, "results": self.results}
