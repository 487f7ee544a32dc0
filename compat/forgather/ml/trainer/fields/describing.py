"""How a field says what it does."""

from typing import Any


def does(text: str, **parser: Any) -> dict[str, Any]:
    """Make a field's metadata: what transformers' HfArgumentParser passes on to ``add_argument``.

    Args:
        text: What the field does, in one or two sentences; shown by ``--help``, so a percent sign is written twice.
        parser: Further arguments of ``argparse``: ``choices``, ``nargs``, ``const``.
    """
    return {"help": text, **parser}
