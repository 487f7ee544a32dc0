"""Rows as TensorBoard events."""

import os
from typing import TYPE_CHECKING

from forgather_fn.reports.path import checked, made_directory, naming
from forgather_fn.reports.row import Row, Sink, opened

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(directory: str | os.PathLike[str]) -> Sink:
    """Write each value as a scalar of its name, at the row's step, through torch's ``SummaryWriter``.

    Every row is flushed, so that a killed run shows all its rows. Each attempt writes a file of its own, which begins
    with a mark that hides the events of earlier attempts beyond ``row.started``. TensorBoard keeps float32.

    Args:
        directory: The log directory of one run; created with its parents at the first row.

    Raises:
        ValueError: At the first row: the directory cannot be created or written to.
    """
    expected = "a directory in which event files can be created"
    checked(directory, "tensorboard")

    def open(row: Row) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        place = made_directory(directory)
        # What is at the purge step is hidden too; but the event at the restored step is that of the step restored.
        return SummaryWriter(os.fspath(place), purge_step=row.started + 1)

    def write(writer: "SummaryWriter", row: Row) -> None:
        with naming(directory, expected):
            for name, value in row.values.items():
                writer.add_scalar(name, value, row.step)
            writer.flush()

    return opened(f"tensorboard({os.fspath(directory)!r})", open, write, lambda writer: writer.close())
