"""Where something stands in a configuration, and the error that says so."""

import attrs


@attrs.frozen
class Position:
    """A place in a template.

    Attributes:
        template: The file that it stands in, as it was asked for: ``projects/demo.yaml``.
        line: Counted from 1; 0 where it is not known.
        block: The innermost block around it, if any.
        text: What stands on that line.
    """

    template: str
    line: int = 0
    block: str | None = None
    text: str = ""

    def __str__(self) -> str:
        place = f"{self.template}, line {self.line}" if self.line else self.template
        return f"{place}, in block {self.block}" if self.block else place


UNKNOWN = Position("<unknown>")


class ConfigError(ValueError):
    """A configuration cannot be used: one block of text that says what, where, and how to set it right.

    Attributes:
        problem: What is wrong, and what was expected.
        position: Where, if known.
        key: The path of keys to it, such as ``trainer.args.lr``.
    """

    def __init__(self, problem: str, position: Position | None = None, key: str = "") -> None:
        lines = [problem]
        if position is not None and position != UNKNOWN:
            lines.append(f"  at {position}")
            if position.text.strip():
                lines.append(f"    | {position.text.strip()}")
        if key:
            lines.append(f"  key {key}")
        super().__init__("\n".join(lines))
        self.problem = problem
        self.position = position
        self.key = key
