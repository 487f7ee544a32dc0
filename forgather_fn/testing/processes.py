"""A pool of processes that are one world, forked once, so that a test over several of them takes milliseconds."""

import atexit
import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import attrs
import torch

SECONDARY: Final = ("Connection closed by peer", "PeerError", "Connection reset", "Broken pipe")
"""What processes say that have failed because another did."""


class ProcessesFailed(AssertionError):
    """Some processes of a pool have failed; the likely root cause comes first.

    Attributes:
        errors: By rank, the traceback, or how the process ended.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        ordered = sorted(errors, key=lambda rank: any(sign in errors[rank] for sign in SECONDARY))
        super().__init__("\n".join(f"rank {rank}:\n{errors[rank]}" for rank in ordered))
        self.errors = dict(errors)


@attrs.define(eq=False)
class Processes:
    """So many processes with torch.distributed over gloo between them; made by :func:`processes`.

    Attributes:
        size: How many.
        timeout: Seconds that a call may take.
    """

    size: int
    timeout: float
    _workers: list[tuple[Any, Connection]] = attrs.field(factory=list)
    _home: "tempfile.TemporaryDirectory[str] | None" = None

    def run(self, function: Callable[..., Any], /, *args: Any) -> list[Any]:
        """Call a function on every process, and give what each returns, by rank.

        Args:
            function: Of a module, so that it can be named to the processes; ``torch.distributed`` tells it its rank.
            args: What it is called with; pickled, as is what it returns.

        Raises:
            ProcessesFailed: It raised, or its process ended, on one of them. The next call starts new processes.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, args))
        return self._results()

    def pids(self) -> list[int]:
        """Name the processes, by rank."""
        if not self._workers:
            self._start()
        return [process.pid for process, _ in self._workers]

    def _results(self) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while waiting:
            ready = wait(list(waiting), self.timeout)
            if not ready:
                errors.update(dict.fromkeys(waiting.values(), f"no answer for {self.timeout:g} s"))
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    good, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank][0]
                    process.join(5)
                    good, value = False, f"the process ended with exit code {process.exitcode}"
                (results if good else errors)[rank] = value
        if errors:
            self.close()
            raise ProcessesFailed(errors)
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._home = tempfile.TemporaryDirectory(prefix="world-")
        rendezvous = str(Path(self._home.name, "rendezvous"))
        port = _free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self.size, rendezvous, port), daemon=True, name=f"rank {rank}"
            )
            process.start()
            there.close()
            self._workers.append((process, here))

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()
        if self._home is not None:
            self._home.cleanup()


@contextlib.contextmanager
def processes(size: int, *, timeout: float = 60.0) -> Iterator[Processes]:
    """Fork a pool of processes that are one world.

    They are forked at the first call and stay for the next ones. Each computes with one thread, since the threads of
    a forked process are not those that torch counts on.

    Args:
        size: How many.
        timeout: Seconds that one call may take.

    Example:
        >>> import torch.distributed
        >>> with processes(2) as pool:
        ...     pool.run(torch.distributed.get_rank)
        [0, 1]
    """
    pool = Processes(size, timeout)
    try:
        yield pool
    finally:
        pool.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(connection: Connection, rank: int, size: int, rendezvous: str, port: int) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    if "accelerate" in sys.modules:  # what it knows is where the parent stands
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    atexit._clear()  # what the parent registered is the parent's to do
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    distributed.init_process_group("gloo", init_method=Path(rendezvous).as_uri(), rank=rank, world_size=size)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            connection.send(answer)
        except BaseException:
            connection.send((False, traceback.format_exc()))
            os._exit(1)
        if not answer[0]:
            os._exit(1)  # which closes its connections, and so wakes the others
