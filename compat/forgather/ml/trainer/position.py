"""Where in the data a training goes on."""

import itertools
from collections.abc import Iterator
from typing import Any

from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.data import has_length
from forgather.ml.trainer.running import Running


class PositionMixin(Attributes):
    """The part of a trainer that finds its place in the data."""

    def _find_position(self, run: Running) -> None:
        """Find where in the data the run goes on."""
        steps, accumulate = self.state.global_step, self._microbatches
        from_start = self.args.ignore_data_skip or not getattr(self.args, "restore_dataset_state", True)
        if has_length(run.feed.loader) or from_start:
            run.epoch = steps // run.lengths.updates_per_epoch
            run.skip = 0 if from_start else steps % run.lengths.updates_per_epoch * accumulate
            return
        while steps:  # how long an epoch is, only reading tells
            run.opened, run.skip = run.feed.open(run.epoch, 0), 0
            while steps and (count := self._read_window(run.opened)):
                run.skip += count
                steps -= 1
            if not steps or not run.skip:
                return
            run.epoch += 1

    def _read_window(self, batches: Iterator[Any]) -> int:
        """Read the microbatches of one step, and count those of all processes."""
        own = sum(1 for _ in itertools.islice(batches, self._own_accumulation))
        return own if self._world.size == 1 else sum(self._world.gather(own))
