"""What the launchers start in tests: processes that watch over each other, until one fails."""

import os
import signal
import sys
import time

import torch
from accelerate import Accelerator
from torch import distributed

from forgather_fn import interrupt
from forgather_fn.distributed.watch import watching
from forgather_fn.world import World, known_to_all


def main(how: str) -> None:
    """Fail on rank 1, or wait for a signal, while processes note signals and are busy."""
    accelerator = Accelerator(cpu=True)
    world = World(distributed.get_rank(), distributed.get_world_size(), control=distributed.group.WORLD)
    watching(world).begin("a step")
    with interrupt.listening() as signalled:
        total = accelerator.reduce(torch.ones(1))  # after it, all of them listen
        say(f"rank {world.rank} of {accelerator.num_processes}: {total.item():g}, {sys.argv[1:]}")
        if how == "together":
            raise known_to_all(ValueError("what all are told"))
        if how != "wait" and world.rank == 1:
            time.sleep(0.5)
            say(f"failing at {time.time()}")
            if how == "raise":
                raise ValueError("what")
            os.kill(os.getpid(), signal.SIGKILL)
        end = time.monotonic() + 60  # so that nothing is left of a test that fails
        while not (how == "wait" and signalled()) and time.monotonic() < end:
            time.sleep(0.1)
        say(signal.Signals(signalled()).name)
        raise interrupt.Preempted(signalled())


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
