"""An address that cannot be listened on says why, before any library is asked to."""

import socket

import pytest

from common.service import metrics, rpc
from common.service.errors import ConfigError
from common.service.listen import check_free, split_host_port


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_host_and_port():
    assert split_host_port("10.0.0.1:9001") == ("10.0.0.1", 9001)
    assert split_host_port("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize("listen", ["", "nowhere", ":9001", "host:", "host:x", "host:-1", "host:65536", "host:1e3"])
def test_another_form_is_refused(listen):
    with pytest.raises(ConfigError, match="expected host:port"):
        check_free(listen)
    with pytest.raises(ConfigError, match="expected host:port"):
        metrics.start_server(listen, "vision")


def test_a_free_address_is_free_afterwards(taken):
    host, port = split_host_port(taken)
    check_free(f"{host}:0")
    with socket.create_server((host, 0)) as other:
        free = other.getsockname()[1]
    check_free(f"{host}:{free}")
    check_free(f"{host}:{free}")
    assert free != port


async def test_a_taken_port(taken):
    for attempt in (
        lambda: check_free(taken),
        lambda: rpc.bind(rpc.make_server(), taken),
        lambda: metrics.start_server(taken, "vision"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot listen on {taken}.*: in use; end what listens there"):
            attempt()


def test_an_address_of_another_machine():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:9001: not an address of this machine"):
        check_free("192.0.2.1:9001")
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid:9001: "):
        check_free("no-such-host.invalid:9001")


def test_sockets(tmp_path):
    path = tmp_path / "server.sock"
    check_free(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(ConfigError, match="in use; end what listens there"):
            check_free(f"unix:{path}")
    check_free(f"unix:{path}")  # left behind: nobody answers
    with pytest.raises(ConfigError, match="no such directory"):
        check_free(f"unix:{tmp_path}/none/server.sock")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="something else has this name"):
        check_free(f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"
