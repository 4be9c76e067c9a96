"""Node groups by hand: ``dvd vision``, ``dvd language`` and ``dvd router``, each on a host of its own, under traffic.

Servers come and go by a watched file, and a host drops off the network. Nano says which number is in a picture, so a
mixed-up or missing feature is a wrong answer; every request counts, and none may fail.
"""

import base64
import contextlib
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prometheus_client.parser import text_string_to_metric_families

from deploy.keys import main as make_keys
from deploy.settings import NANO, KeysSettings, model_directory
from tests.end_to_end.conftest import user
from tests.end_to_end.namespaces import Host, network

pytestmark = pytest.mark.timeout(600)

DEADLINE: Final = 200.0
VISION_PORT, LANGUAGE_PORT, FEATURE_PORT = 9001, 9101, 9102
SERVERS: Final = ("vision-a", "vision-b", "language-a", "language-b")
PICTURE: Final = model_directory(NANO) / "images" / "number.png"
QUESTION, ANSWER = "Which number do you see?", "The number is 7059."


@dataclass
class NodeGroups:
    """Two vision servers, two language servers and a router on five hosts; which servers it uses, two files say."""

    hosts: dict[str, Host]
    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        """The router's HTTP side: a path is no matter of the network, so the client needs no host of its own."""
        return self.directory / "router.sock"

    @property
    def keys(self) -> Path:
        """Of all hosts: other machines are let in by certificate."""
        return self.directory / "keys"

    def start(self, name: str, *command: str) -> None:
        """Run ``dvd ...`` on the host of that name."""
        host = self.hosts[name]
        arguments = host.command(sys.executable, "-m", "deploy.cli", *command)
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(arguments, stderr=log, stdout=subprocess.DEVNULL)

    def start_router(self) -> None:
        sources = [f"--{tier}=file:{self.directory / tier}" for tier in ("vision", "language")]
        self.start("router", "router", *sources, f"--uds={self.socket}", f"--keys={self.keys}")

    def start_server(self, name: str) -> None:
        tier = name.partition("-")[0]
        options = [f"--listen={self.address(name)}", f"--name={name}", "--threads=1", "--metrics-listen=null"]
        options.append(f"--keys={self.keys}")
        if tier == "language":
            options.append(f"--feature-listen={self.hosts[name].address}:{FEATURE_PORT}")
        self.start(name, tier, NANO, *options)

    def address(self, name: str) -> str:
        return f"{self.hosts[name].address}:{VISION_PORT if name.startswith('vision') else LANGUAGE_PORT}"

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def set_members(self, tier: str, *names: str) -> None:
        """Replace the tier's file, and wait until the router uses just these."""
        draft = self.directory / "draft"
        draft.write_text("".join(f"{self.address(name)}  # {name}\n" for name in names))
        draft.replace(self.directory / tier)
        self.until(lambda: self.states(tier) == {"ready": len(names)}, f"{tier} {names}")

    def states(self, tier: str) -> dict[str, int]:
        """How many servers of a tier the router has in which state."""
        samples = [sample for sample in self.metrics("dvd_servers") if sample.labels["tier"] == tier and sample.value]
        return {sample.labels["state"]: int(sample.value) for sample in samples}

    def num_calls(self, name: str) -> float:
        """Calls that ended well on a server; its series go when it does."""
        samples = [sample for sample in self.metrics("dvd_dispatch_total") if sample.labels["server"] == name]
        return sum(sample.value for sample in samples if sample.labels["outcome"] == "ok")

    def metrics(self, name: str) -> list[Any]:
        with self.client() as client:
            text = client.get("/metrics").text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return [sample for sample in samples if sample.name == name]

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(base_url="http://router", transport=transport, timeout=DEADLINE)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for it; nothing may have died meanwhile."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not dead, f"{dead} ended: {self.log(dead[0]).read_text()}"
            assert time.monotonic() < deadline, f"{what}: {self.log('router').read_text()}"
            time.sleep(0.1)

    def is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


class Traffic:
    """A few clients that ask one after the other, every time with another picture, until the block ends.

    Leaving the block fails the test if any request failed or was answered wrongly.
    """

    def __init__(self, groups: NodeGroups, num_clients: int = 3) -> None:
        self._groups = groups
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]
        self.num_right = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE)
        assert self.failures == []
        assert self.num_right > 0

    def go_on(self, num_more: int = 6) -> None:
        """Return after so many more answers."""
        goal = self.num_right + num_more
        self._groups.until(lambda: self.num_right >= goal or self.failures, "traffic")

    def until_used(self, name: str, num_more: int = 2) -> None:
        """Return once a server has had a part in it."""
        goal = self._groups.num_calls(name) + num_more
        self._groups.until(lambda: self._groups.num_calls(name) >= goal or self.failures, f"work for {name}")

    def _ask(self) -> None:
        with self._groups.client() as client:
            while not self._stop.is_set() and not self.failures:
                outcome = _ask_once(client)
                if outcome == ANSWER:
                    self.num_right += 1
                else:
                    self.failures.append(outcome)


_serial = itertools.count()


def _ask_once(client: httpx.Client) -> str:
    """The answer, or what went wrong. Every picture has bytes of its own, so none is known already."""
    note = PngInfo()
    note.add_text("serial", f"{os.getpid()}-{next(_serial)}")
    buffer = io.BytesIO()
    with Image.open(PICTURE) as image:
        image.save(buffer, "PNG", pnginfo=note)
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    try:
        response = client.post("/v1/chat/completions", json={"messages": [user(QUESTION, url)], "max_tokens": 16})
    except httpx.TransportError as error:
        return repr(error)
    if response.status_code != 200:
        return f"{response.status_code} {response.text}"
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Iterator[NodeGroups]:
    """The router starts first, so that it has everything still to wait for."""
    with network([*SERVERS, "router"]) as hosts:
        groups = NodeGroups(hosts, tmp_path_factory.mktemp("groups"))
        make_keys(KeysSettings.load([]), ["init", str(groups.keys)])
        with contextlib.closing(groups):
            groups.start_router()
            groups.until(groups.is_listening, "router")
            with groups.client() as client:
                assert client.get("/health").status_code == 503
            for name in SERVERS:
                groups.start_server(name)
            yield groups


def test_any_start_order_and_right_answers_across_hosts(groups):
    waiting = f"waiting for vision servers from file:{groups.directory / 'vision'}: no such file or directory"
    groups.until(lambda: waiting in groups.log("router").read_text(), "a word on the missing file")
    groups.set_members("vision", "vision-a")
    groups.set_members("language", "language-a")
    with groups.client() as client:
        assert client.get("/health").status_code == 200
    with Traffic(groups) as traffic:
        traffic.go_on()
    assert groups.num_calls("vision-a") == groups.num_calls("language-a") == traffic.num_right


def test_a_vision_server_is_added_and_the_first_removed_under_traffic(groups):
    groups.set_members("language", "language-a")
    groups.set_members("vision", "vision-a")
    with Traffic(groups) as traffic:
        traffic.until_used("vision-a")
        groups.set_members("vision", "vision-a", "vision-b")
        traffic.until_used("vision-b")
        groups.set_members("vision", "vision-b")
        traffic.go_on()
        assert groups.num_calls("vision-a") == 0  # its series are gone
    assert "vision server vision-a (" in groups.log("router").read_text()


def test_a_language_server_is_added_and_the_first_removed_under_traffic(groups):
    groups.set_members("vision", "vision-a")
    groups.set_members("language", "language-a")
    with Traffic(groups) as traffic:
        traffic.until_used("language-a")
        groups.set_members("language", "language-a", "language-b")
        traffic.until_used("language-b")
        groups.set_members("language", "language-b")
        traffic.go_on()


def test_a_vision_host_drops_off_the_network_and_comes_back(groups):
    """What it had in work is lost after three seconds of silence, and done by the other one."""
    groups.set_members("language", "language-a")
    groups.set_members("vision", "vision-a", "vision-b")
    with Traffic(groups) as traffic:
        traffic.until_used("vision-a")
        traffic.until_used("vision-b")
        groups.hosts["vision-b"].set_link("down")
        groups.until(lambda: groups.states("vision") == {"ready": 1, "lost": 1}, "loss of vision-b")
        traffic.go_on()
        groups.hosts["vision-b"].set_link("up")
        groups.until(lambda: groups.states("vision") == {"ready": 2}, "return of vision-b")
        traffic.until_used("vision-b")


def test_every_server_drains_and_ends(groups):
    """The last one: a server that is told to end under traffic, then all of them, the router first."""
    groups.set_members("vision", "vision-a", "vision-b")
    with Traffic(groups) as traffic:
        traffic.go_on(3)
        end(groups, ["vision-a"])
        groups.until(lambda: groups.states("vision") == {"ready": 1, "lost": 1}, "end of vision-a")
        traffic.go_on()
    for names in (["router"], ["language-a", "language-b"], ["vision-b"]):
        end(groups, names)


def end(groups: NodeGroups, names: Sequence[str]) -> None:
    """SIGTERM, and a clean exit."""
    for name in names:
        groups.processes[name].send_signal(signal.SIGTERM)
    for name in names:
        assert groups.processes.pop(name).wait(DEADLINE) == 0, groups.log(name).read_text()
