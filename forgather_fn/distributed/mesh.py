"""Sockets from each process of a run to each other one.

All to all, as gloo connects them, so that each sees for itself when another ends, and no process is needed to pass it
on. Each listens, all tell their addresses through the group that they have, and each connects to those of lower rank.
"""

import contextlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Final

import attrs

from forgather_fn.world import World

TIMEOUT: Final = 60.0
"""Seconds in which the others must be reached."""
_HELLO: Final = 10.0
"""Seconds in which who connects must have said who it is."""
_HALF: Final = 16
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
"""After 25 s without an answer from a machine its sockets close: that is how one that lost power is noticed."""


@attrs.frozen(eq=False)
class Peer:
    """Another process of the run.

    Attributes:
        rank: Its rank.
        name: Its number and its machine, for people.
        socket: To it.
    """

    rank: int
    name: str
    socket: socket.socket


@attrs.frozen
class _Address:
    host: str | None  # None: on the master's own machine, which others reach as they reach the master
    port: int
    name: str


def connected(world: World) -> list[Peer]:
    """Connect this process with all others of its world; collective.

    Who connects must know a secret that the first process gave through the group.

    Raises:
        ConnectionError: Another process could not be reached, with the address that was tried.
    """
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listening(world.size))
        here = f"process {os.getpid()} on {socket.gethostname()}"
        secret = world.broadcast(secrets.token_bytes(2 * _HALF) if world.main else None)
        question, answer = secret[:_HALF], secret[_HALF:]
        hosts = world.gather(socket.gethostname())
        master = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(hosts)) == 1 else hosts[0])
        addresses = world.gather(_Address(_interface_to(master), listener.getsockname()[1], here))
        found: dict[int, socket.socket] = {}
        for rank, address in enumerate(addresses[: world.rank]):
            found[rank] = opened.enter_context(_ask(address, rank, master, question, world.rank))
        for rank, one in _answers(listener, world, question, answer):
            found[rank] = opened.enter_context(one)
        for rank in range(world.rank):
            if not hmac.compare_digest(_received(found[rank], _HALF), answer):
                raise ConnectionError(f"rank {rank} is not who answers at {addresses[rank].host or master}")
        for one in found.values():
            _tune(one)
        listener.close()
        opened.pop_all()
    return [Peer(rank, addresses[rank].name, one) for rank, one in found.items()]


def _listening(size: int) -> socket.socket:
    """Listen on all interfaces; as many can connect at once as there are processes."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True)
    except (OSError, ValueError):  # without IPv6
        return socket.create_server(("", 0), backlog=size)


def _interface_to(master: str) -> str | None:
    """Find the address of the interface over which this machine reaches the master; None if that never leaves it."""
    found = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # of a datagram socket: chooses the interface, sends nothing
            except OSError:
                continue
            host = str(probe.getsockname()[0])
            return None if host == "::1" or host.startswith("127.") else host
    return None


def _ask(address: _Address, rank: int, master: str, question: bytes, own_rank: int) -> socket.socket:
    place = address.host or master, address.port
    try:
        one = socket.create_connection(place, timeout=TIMEOUT)
    except OSError as error:
        raise ConnectionError(
            f"rank {own_rank} cannot reach rank {rank} ({address.name}) at {place[0]} port {place[1]}: {error}. All "
            "processes of a run must reach each other: set MASTER_ADDR to an address of the first machine that the "
            "others can reach, and let the firewalls between them pass all ports"
        ) from error
    one.sendall(question + own_rank.to_bytes(4))
    return one


def _answers(
    listener: socket.socket, world: World, question: bytes, answer: bytes
) -> Iterator[tuple[int, socket.socket]]:
    """Wait for the processes of higher rank; whoever does not know the secret is sent away."""
    missing = set(range(world.rank + 1, world.size))
    end = time.monotonic() + TIMEOUT
    while missing:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            one, _ = listener.accept()
        except TimeoutError as error:
            raise ConnectionError(f"rank {world.rank} has waited {TIMEOUT:g} s for ranks {sorted(missing)}") from error
        one.settimeout(_HELLO)
        said = _received(one, _HALF + 4)
        rank = int.from_bytes(said[_HALF:])
        if not hmac.compare_digest(said[:_HALF], question) or rank not in missing:
            one.close()
            continue
        one.sendall(answer)
        missing.remove(rank)
        yield rank, one


def _received(one: socket.socket, size: int) -> bytes:
    """Read so many bytes, or what comes before the end, or before the time is over."""
    found = b""
    try:
        while len(found) < size and (more := one.recv(size - len(found))):
            found += more
    except OSError:
        pass
    return found


def _tune(one: socket.socket) -> None:
    one.settimeout(1.0)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not all systems have all of them
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
