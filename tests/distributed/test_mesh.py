"""The sockets between processes, between threads that stand for them."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest

from forgather_fn.distributed import mesh


@attrs.frozen
class Shared:
    """What threads exchange values over."""

    size: int
    values: list
    barrier: threading.Barrier


@attrs.frozen
class ThreadWorld:
    """A thread that stands for a process."""

    rank: int
    shared: Shared
    seen: list = attrs.field(factory=list)

    @property
    def size(self):
        return self.shared.size

    @property
    def main(self):
        return self.rank == 0

    def gather(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait(20)
        found = list(self.shared.values)
        self.shared.barrier.wait(20)
        if self.rank == 1 and isinstance(value, mesh._Address):
            interfere(found)
        return found

    def broadcast(self, value):
        return self.gather(value)[0]


def interfere(addresses):
    """Connect before the others do, with something else to say."""
    for said in (b"GET / HTTP/1.1\r\n" + (3).to_bytes(4), b"", b"short"):
        one = socket.create_connection(("127.0.0.1", addresses[0].port))
        one.sendall(said)
        one.close()


def connect_all(size):
    shared = Shared(size, [None] * size, threading.Barrier(size))
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(mesh.connected, [ThreadWorld(rank, shared) for rank in range(size)]))


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost", None])
def test_each_reaches_each_and_strangers_are_sent_away(master, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if master is not None:
        monkeypatch.setenv("MASTER_ADDR", master)
    found = connect_all(4)
    try:
        assert [sorted(peer.rank for peer in peers) for peers in found] == [
            [other for other in range(4) if other != rank] for rank in range(4)
        ]
        for rank, peers in enumerate(found):
            for peer in peers:
                peer.socket.sendall(bytes([rank, peer.rank]))
        for rank, peers in enumerate(found):
            for peer in peers:
                assert peer.socket.recv(2) == bytes([peer.rank, rank])
    finally:
        for peers in found:
            for peer in peers:
                peer.socket.close()


def test_one_that_cannot_be_reached_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    address = mesh._Address(None, port, "process 7 on there")
    with pytest.raises(
        ConnectionError, match=r"rank 1 cannot reach rank 0 \(process 7 on there\) at 127.0.0.1 port .*"
    ):
        mesh._ask(address, 0, "127.0.0.1", b"?", 1)


def test_the_interface_to_this_machine_is_none():
    assert mesh._interface_to("127.0.0.1") is None
    assert mesh._interface_to("localhost") is None
