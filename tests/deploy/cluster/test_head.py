"""A Ray head that is not there, is another thing, or obeys everybody: one line each, before anything is started."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from common.service.errors import StartupError, Unavailable
from deploy.cluster import head
from deploy.cluster.head import Head, check_guard, is_reachable, require_ray


class StrangersHandler(grpc.GenericRpcHandler):
    """Answers the one call of a head that a stranger makes."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self._status = status

    def service(self, handler_call_details):
        if not handler_call_details.method.startswith("/ray.rpc."):
            return None

        def answer(request, context):
            if self._status is not grpc.StatusCode.OK:
                context.abort(self._status, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def listen() -> Iterator[object]:
    """Starts a gRPC server that treats strangers as told; None: it knows nothing of Ray."""
    servers = []

    def start(status: grpc.StatusCode | None) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(1))
        if status is not None:
            server.add_generic_rpc_handlers([StrangersHandler(status)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_nobody_listens():
    address = free_address()
    with pytest.raises(StartupError, match=f"ray.address {address}: connection refused; start a head there"):
        Head(address, "one")
    assert not is_reachable(address)


def test_somebody_else_listens(listen):
    address = listen(None)
    with pytest.raises(StartupError, match="this is not the head of a Ray cluster"):
        Head(address, "one")
    assert not is_reachable(address)


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(head, "_REACH_SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(StartupError, match=r"no answer within 0\.2 s; is the head up, and the port open\?"),
    ):
        Head(f"127.0.0.1:{silent.getsockname()[1]}", "one")


def test_a_head_that_obeys_everybody_is_refused(listen):
    address = listen(grpc.StatusCode.OK)
    with pytest.raises(StartupError, match=f"{address} takes orders from everybody.* RAY_AUTH_MODE=token .*--insecure"):
        check_guard(address)
    guarded = listen(grpc.StatusCode.UNAUTHENTICATED)
    check_guard(guarded)
    assert is_reachable(guarded)


def test_no_head_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(StartupError, match=r"ray\.address auto: no Ray cluster on this machine: ray start --head"):
        Head("auto", "one")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(free_address())
    with pytest.raises(StartupError, match=r"ray\.address auto: the head at 127\.0\.0\.1:\d+ is gone; no Ray cluster"):
        Head("auto", "one")


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StartupError, match=r"dvd up needs ray: pip install 'dvd-serve\[ray\]'"):
        require_ray()


class SlowHead(Head):
    """A head whose bridge is a program that answers each call after the one before was given up."""

    def __init__(self) -> None:
        source = (
            "import json, sys, time\n"
            "for line in sys.stdin:\n"
            "    call = json.loads(line)\n"
            "    time.sleep(call.get('pause', 0))\n"
            "    print(json.dumps({'number': call['number'], 'value': call['do']}), flush=True)\n"
        )
        self._num_calls, self._unread, self._errors = 0, b"", os.open(os.devnull, os.O_RDWR)
        self._child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_late_answer_of_a_call_that_was_given_up_is_nobody_elses():
    with SlowHead() as head:
        with pytest.raises(Unavailable, match="does not answer"):
            head.call("first", seconds=0.01, pause=0.5)
        assert head.call("second") == "second"
        assert head.call("third") == "third"
