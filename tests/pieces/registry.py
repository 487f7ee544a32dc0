"""All rows, by name."""

import importlib
import pkgutil
from collections.abc import Mapping

from tests import pieces
from tests.pieces.piece import Piece


def gathered() -> Mapping[str, Piece]:
    """Join the ``PIECES`` of all modules of the folder."""
    found: dict[str, Piece] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(pieces.__path__)):
        if module not in ("piece", "registry"):
            own: Mapping[str, Piece] = importlib.import_module(f"{pieces.__name__}.{module}").PIECES
            assert not set(own) & set(found), f"two rows are named {sorted(set(own) & set(found))}"
            found |= own
    return found


REGISTRY: Mapping[str, Piece] = gathered()
