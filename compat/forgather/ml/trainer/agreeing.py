"""What the processes of a training agree on: its steps, and what callbacks ask for."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch

from forgather.ml.trainer.counting import weight_of
from forgather.ml.trainer.data import Lengths
from forgather.ml.trainer.logs import LogMixin
from forgather.ml.trainer.trainer_types import TrainerControl
from forgather.ml.trainer.windows import Window, added, items_of, told
from forgather_fn.world import World, known_to_all

_FLAGS = tuple(field.name for field in fields(TrainerControl))


class AgreeingMixin(LogMixin):
    """The part of a trainer that makes its processes do the same.

    Callbacks run on every process, as with transformers, and what they ask for may differ: a clock, a file, a callback
    that only the first process has. What counts is what those of the first process ask for.
    """

    _loss_shifts_labels: bool
    _watched: bool
    _halved: bool

    def _wants_halves(self) -> bool:
        raise NotImplementedError

    def _is_watched(self) -> bool:
        """Tell whether code of users runs between steps, that may change parameters, the optimizer or the control."""
        known = ("forgather.ml.", "transformers.trainer_callback")
        if any(not type(callback).__module__.startswith(known) for callback in self.callback_handler.callbacks):
            return True
        return not type(self).__module__.startswith("forgather.ml.")

    def _compare(self, lengths: Lengths) -> None:
        """Find out, before the first step, whether on any process somebody looks on or inside.

        Raises:
            ValueError: The processes have other data.
        """
        if self._peers.size == 1:
            return
        found = self._peers.gather((self._is_watched(), self._wants_halves(), lengths))
        self._watched, self._halved = any(one[0] for one in found), any(one[1] for one in found)
        if any(length != lengths for _, _, length in found):
            each = "\n".join(f"  rank {rank}: {length}" for rank, (_, _, length) in enumerate(found))
            raise known_to_all(
                ValueError(
                    f"the processes have other data:\n{each}\nGive each of them all of it: the trainer shares it out"
                )
            )

    def _window(self, batches: list[Any], items: Any) -> Window:
        """Make the microbatches of the next step out of those of this process."""
        weights = self._weights(batches, items)
        if self._world.size == 1:
            own = told(batches, weights)
            return Window(batches, weights, 0, items, own, own)
        counted = isinstance(items, torch.Tensor)
        own = told(
            batches,
            weights,
            items=float(items) if counted else 0.0,
            counted=len(batches) if counted else 0,
            flos=sum(self.floating_point_ops(batch) for batch in batches),
            tokens=sum(self._input_tokens(batch) for batch in batches),
            watched=self._is_watched(),
            halves=self._wants_halves(),
        )
        everyone = added(self._world, own)
        self._watched, self._halved = bool(everyone.watched), bool(everyone.halves)
        items = items_of(everyone, self.args.device)
        return Window(batches, weights, self._own_share.block.start, items, everyone, own)

    def _weights(self, batches: list[Any], items: Any) -> list[float]:
        """Weigh the microbatches of a step; one alone weighs what was counted already."""
        if len(batches) == 1 and isinstance(items, torch.Tensor) and items.device.type == "cpu":
            return [float(items)]
        return [weight_of(batch, self._loss_shifts_labels) for batch in batches]

    def _agree(self) -> None:
        """Take what the callbacks of the first process ask for; nothing is sent where all callbacks are known ones."""
        peers = self._peers
        if peers.size == 1 or not self._watched:
            return
        from torch import distributed

        asked = torch.tensor([bool(getattr(self.control, name)) for name in _FLAGS])
        with peers.explained():
            distributed.broadcast(asked, group=peers.control, group_src=0)
        for name, on in zip(_FLAGS, asked.tolist(), strict=True):
            setattr(self.control, name, on)


def agreed(world: World, asked: Callable[[], bool], heeded: bool) -> Callable[[], bool]:
    """Make a question that is asked at each step have one answer on all processes; theirs is known one step later.

    Args:
        world: The processes.
        asked: Answers on this one.
        heeded: Whether the answer is ever yes.
    """
    if not heeded or world.size == 1:
        return asked
    vote = world.polled()
    return lambda: bool(vote(int(asked())))


@contextlib.contextmanager
def telling(world: World) -> Iterator[None]:
    """Tell the other processes of a training that it cannot go on here, and why."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, "known_to_all", False):
            world.fail(error)
        raise
