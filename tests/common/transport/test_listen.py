"""Addresses to listen on: one that can be dialled, or a directory that only we can enter."""

import os
import stat
from pathlib import Path

import pytest

from common.service.errors import ConfigError
from common.transport.listen import check_host_port, new_socket_path, nth_port
from common.transport.registry import make_receiver
from tests.common.transport.fakes import MemorySink


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:4100", "node-7.cluster:65535"])
def test_an_address_of_this_machine(listen: str):
    assert check_host_port(listen) == listen


@pytest.mark.parametrize("listen", ["*:0", "0.0.0.0:4100", "[::]:4100", ":4100"])
def test_wildcards_are_refused(listen: str):
    with pytest.raises(ConfigError, match="one address"):
        check_host_port(listen)


@pytest.mark.parametrize("listen", ["", "host", "host:", "host:port", "host:-1", "host:65536", "unix:/tmp/x"])
def test_what_is_no_address(listen: str):
    with pytest.raises(ConfigError, match="host:port"):
        check_host_port(listen)


@pytest.mark.parametrize(
    ("listen", "addresses"),
    [
        ("10.0.0.7:0", ["10.0.0.7:0", "10.0.0.7:0"]),
        ("10.0.0.7:4100", ["10.0.0.7:4100", "10.0.0.7:4101"]),
        ("unix-dir:/run/dvd:1", ["unix-dir:/run/dvd:1", "unix-dir:/run/dvd:1"]),
    ],
)
def test_every_transport_has_an_address_of_its_own(listen: str, addresses: list[str]):
    assert [nth_port(listen, index) for index in range(2)] == addresses


def test_the_directory_is_made_private_and_names_are_fresh(tmp_path: Path):
    listen = f"unix-dir:{tmp_path / 'new' / 'sockets'}"
    first, second = new_socket_path(listen, "zmq"), new_socket_path(listen, "zmq")
    assert first != second
    assert first.parent == tmp_path / "new" / "sockets"
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int):
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="0700"):
        new_socket_path(f"unix-dir:{tmp_path}", "zmq")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        new_socket_path(f"unix-dir:{tmp_path / 'file' / 'sockets'}", "zmq")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="too long"):
        new_socket_path(f"unix-dir:{tmp_path / ('x' * 100)}", "zmq")


@pytest.mark.usefixtures("clean_loop")
@pytest.mark.parametrize("transport", ["tcp", "zmq", "grpc"])
async def test_a_taken_port_is_a_config_error(transport: str):
    first = make_receiver(transport, "127.0.0.1:0")
    port = (await first.start(MemorySink())).address.rpartition(":")[2]
    second = make_receiver(transport, f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="cannot listen"):
        await second.start(MemorySink())
    await second.close()
    await first.close()


@pytest.mark.usefixtures("clean_loop")
@pytest.mark.parametrize("transport", ["tcp", "zmq", "grpc"])
async def test_an_address_of_another_machine_is_a_config_error(transport: str):
    receiver = make_receiver(transport, "192.0.2.1:0")
    with pytest.raises(ConfigError, match="cannot listen"):
        await receiver.start(MemorySink())
    await receiver.close()


@pytest.mark.usefixtures("clean_loop")
@pytest.mark.parametrize("transport", ["tcp", "zmq", "grpc"])
async def test_the_socket_is_a_file_until_close(transport: str, private_directory: str):
    receiver = make_receiver(transport, f"unix-dir:{private_directory}")
    endpoint = await receiver.start(MemorySink())
    (name,) = os.listdir(private_directory)
    assert endpoint.address.endswith(f"{private_directory}/{name}")
    await receiver.close()
    assert os.listdir(private_directory) == []
