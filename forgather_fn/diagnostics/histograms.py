"""Histograms of parameters and gradients, for TensorBoard."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from forgather_fn.diagnostics.names import chosen
from forgather_fn.loop import Tick
from forgather_fn.reports.path import made_directory
from forgather_fn.signature import checked
from forgather_fn.stages import Observer
from forgather_fn.wanted import WANTS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@checked
def histograms(
    directory: str | os.PathLike[str], *, params: str | None = "*", gradients: str | None = None
) -> Observer:
    """Write histograms of parameters, and of the gradients that moved them, as TensorBoard events.

    They go to ``<directory>/histograms``, which TensorBoard shows beside the scalars of the directory. Events of an
    earlier attempt beyond the step that this one was restored at are hidden. What is not finite is left out.

    Args:
        directory: That of the run; created with its parents at the first look.
        params: Which parameters, by a pattern of the shell such as ``"layers.*.weight"``; None for none. Where they lie
            in shards, or on several stages, they are brought together at each look.
        gradients: Which gradients, likewise: those of the step, before transforms. A step that is looked at copies all
            of them. Refused where no process has all of a gradient, and with ``update="in_backward"``.

    Returns:
        For :func:`~forgather_fn.stages.every` and the like.

    Raises:
        ValueError: Neither is asked for. At the first look: no name matches; the directory cannot be used.
    """
    if params is None and gradients is None:
        raise ValueError('histograms: of nothing; give params="*" or gradients="*"')
    held: list[SummaryWriter] = []

    def writer(tick: Tick) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        if not held:
            place = made_directory(Path(directory) / "histograms")
            held.append(SummaryWriter(os.fspath(place), purge_step=tick.run.started + 1))
        return held[0]

    def observe(tick: Tick) -> None:
        state = tick.run.program.whole(tick.state) if params is not None else tick.state
        if not tick.run.program.world.main:
            return
        assert state is not None
        found: dict[str, Tensor] = {}
        if params is not None:
            found |= {f"param/{name}": state.params[name] for name in chosen("parameter", state.params, params)}
        if gradients is not None:
            prefix = WANTS["gradients"]
            own = {name.removeprefix(prefix): g for name, g in tick.metrics.items() if name.startswith(prefix)}
            found |= {f"{prefix}{name}": own[name] for name in chosen("gradient", own, gradients)}
        _write(writer(tick), found, tick.state.step)

    def close() -> None:
        while held:
            held.pop().close()

    return Observer(observe, wants=frozenset() if gradients is None else frozenset({"gradients"}), close=close)


def _write(writer: "SummaryWriter", found: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in found.items():
        values = tensor.detach().float().cpu()
        values = values[values.isfinite()]
        if values.numel():
            writer.add_histogram(name, values, step)
    writer.flush()
