"""The fault proxy does what it is told, and what a seed has done once it does again."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import Links, Mischief, Proxy

HOST, OTHER_HOST = "127.0.0.1", "127.0.0.2"
WAIT = 20.0
TEXT = random.Random(0).randbytes(65536)


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """A server that sends back what it gets; its address."""
    with socket.create_server((HOST, 0)) as listener:
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        yield f"{HOST}:{listener.getsockname()[1]}"


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            threading.Thread(target=_echo, args=(listener.accept()[0],), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(65536):
            connection.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with echo() as address, Links(OTHER_HOST, seed=3) as links:
        yield links.add(address)


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def exchange(proxy: Proxy, text: bytes = TEXT) -> bytes:
    """What comes back on a connection of its own, until the other side closes."""
    with connect(proxy) as connection:
        threading.Thread(target=_send, args=(connection, text), daemon=True).start()
        parts = []
        while data := connection.recv(65536):
            parts.append(data)
        return b"".join(parts)


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def _send(connection: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)


def test_honest_by_default_and_each_target_keeps_its_port(proxy):
    assert proxy.address.startswith(OTHER_HOST)
    assert exchange(proxy) == TEXT
    assert proxy.num_accepted == 1
    until(lambda: proxy.num_connections == 0)


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_one_flipped_bit_in_one_direction(proxy, direction):
    proxy.misbehave(Mischief(corrupt=1), direction)
    came = exchange(proxy, TEXT[:1000])
    differing = [(was, now) for was, now in zip(TEXT, came, strict=False) if was != now]
    assert len(came) == 1000
    assert [(was ^ now).bit_count() for was, now in differing] == [1]


def test_the_same_seed_damages_the_same_bytes():
    results = []
    for _ in range(2):
        with echo() as address, Links(OTHER_HOST, seed=11) as links:
            proxy = links.add(address)
            proxy.misbehave(Mischief(corrupt=1))
            results.append(exchange(proxy, TEXT[:1000]))
    assert results[0] == results[1] != TEXT[:1000]


def test_drop_duplicate_and_reorder(proxy):
    proxy.misbehave(Mischief(drop=1), "to_server")
    assert exchange(proxy) == b""
    proxy.misbehave(Mischief(duplicate=1), "to_server")
    assert exchange(proxy, b"twice ") == b"twice twice "
    proxy.misbehave(Mischief(reorder=1), "to_server")
    came = exchange(proxy)
    assert came != TEXT and sorted(came) == sorted(TEXT)


def test_delay_loss_and_rate(proxy):
    for mischief in (Mischief(delay=0.3), Mischief(jitter=0.001, loss=1), Mischief(rate=len(TEXT) / 0.4)):
        proxy.misbehave(mischief, "to_server")
        started = time.monotonic()
        assert exchange(proxy) == TEXT
        assert time.monotonic() - started > 0.19


def test_cut_in_the_middle_of_a_message(proxy):
    proxy.misbehave(Mischief(cut_after=50_000), "to_server")
    with pytest.raises(ConnectionResetError):
        exchange(proxy)


def test_a_blocked_link_delivers_when_it_is_healed(proxy):
    """As TCP does: what was sent meanwhile is sent again."""
    with connect(proxy) as connection:
        connection.sendall(b"before ")
        assert connection.recv(100) == b"before "
        proxy.misbehave(Mischief(blocks=True), "to_client")
        connection.sendall(b"meanwhile")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        proxy.heal()
        connection.settimeout(WAIT)
        assert connection.recv(100) == b"meanwhile"


def test_reset_and_refuse(proxy):
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    proxy.refuse()
    with contextlib.suppress(ConnectionResetError):  # of which the thread that sends may hear instead
        assert exchange(proxy, b"y") == b""
    proxy.heal()
    assert exchange(proxy) == TEXT


def test_half_close(proxy):
    """The server hears the end, answers what it had, and closes."""
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        proxy.half_close("to_server")
        assert connection.recv(1) == b""


def test_a_target_that_is_not_there_looks_like_one_that_died():
    with socket.socket() as unheard, Links(OTHER_HOST) as links:
        unheard.bind((HOST, 0))  # kept, so that nobody else gets the port
        proxy = links.add(f"{HOST}:{unheard.getsockname()[1]}")
        # Nothing is sent: the kernel tells of a reset once, be it while connecting, and a sender would hear it instead.
        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(1)
