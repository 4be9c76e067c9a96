"""What ``auto`` means on this machine, and what happens to transports that cannot be had."""

import importlib
import logging
from collections.abc import Iterator

import pytest

from common.service.errors import ConfigError
from common.transport import registry
from common.transport.registry import TRANSPORTS, can_reach, choose_transports, make_receivers, why_unavailable
from protos.status_pb2 import Endpoint


@pytest.fixture(autouse=True)
def looked_at_anew() -> Iterator[None]:
    for cached in (registry.why_unavailable, registry._automatic):
        cached.cache_clear()
    yield
    for cached in (registry.why_unavailable, registry._automatic):
        cached.cache_clear()


@pytest.fixture
def without_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    shm = importlib.import_module("common.transport.shm")
    monkeypatch.setattr(shm, "why_unavailable", lambda: "no shared memory: forbidden")


def test_what_is_made_of_required_libraries_is_always_there():
    assert [name for name in TRANSPORTS if name != "nixl" and why_unavailable(name)] == []


def test_auto_is_all_of_them_best_first():
    chosen = choose_transports(["auto"])
    assert [name for name in chosen if name != "nixl"] == ["shm", "tcp", "zmq", "grpc"]
    assert list(chosen) == [name for name in TRANSPORTS if name in chosen]


def test_auto_stands_for_those_not_named_beside_it():
    assert choose_transports(["grpc", "auto"])[:2] == ("grpc", "shm")
    assert choose_transports(["auto", "tcp"])[-1] == "tcp"
    assert choose_transports(["zmq", "zmq"]) == ("zmq",)


@pytest.mark.usefixtures("without_shm")
def test_auto_leaves_out_what_cannot_be_had_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert "shm" not in choose_transports(["auto"])
    assert "shm" in caplog.text and "forbidden" in caplog.text


@pytest.mark.usefixtures("without_shm")
def test_what_is_named_and_cannot_be_had_is_an_error():
    with pytest.raises(ConfigError, match="'shm': no shared memory: forbidden"):
        choose_transports(["shm", "auto"])


def test_a_library_that_is_not_installed_is_the_reason(monkeypatch):
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'nixl'", name="nixl")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert why_unavailable("nixl") == "nixl is not installed"


def test_only_transports_that_need_a_port_take_one(monkeypatch):
    listening = []
    monkeypatch.setattr(
        registry, "make_receiver", lambda transport, listen, limits: listening.append((transport, listen))
    )
    make_receivers(["shm", "tcp", "zmq"], "127.0.0.1:4100")
    assert listening[1:] == [("tcp", "127.0.0.1:4100"), ("zmq", "127.0.0.1:4101")]


def test_most_addresses_may_be_tried():
    assert can_reach(Endpoint(transport="zmq", address="tcp://192.0.2.1:9"))
    assert not can_reach(Endpoint(transport="shm", address="nonsense"))
