"""A cluster of two vision servers, two language servers and two routers on three nodes, from up to down.

The tests are acts of one play, in order: starting it anew for each would take a minute. Counts of failed requests are
printed (``pytest -s``).
"""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.cluster.conftest import kill_node, wait_until
from tests.deploy.cluster.traffic import Traffic

pytestmark = pytest.mark.timeout(300)

READY = re.compile(r"ready at (http://127\.0\.0\.\d:\d+) model nano vision x2 language x2")


@pytest.fixture(scope="module")
def shared_memory() -> set[str]:
    """What lies in /dev/shm before."""
    return set(os.listdir("/dev/shm"))


def router_urls(servers: list[dict[str, Any]]) -> list[str]:
    return [f"http://{server['address']}" for server in servers if server["tier"] == "router"]


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_up_says_where_it_is_ready(operator, raylets, shared_memory):
    lines = operator.done(
        "up", operator.file("acts", vision={"replicas": 2}, language={"replicas": 2}, routers={"replicas": 2})
    )
    urls = [match[1] for match in map(READY.fullmatch, lines.splitlines()) if match]
    found = operator.look()
    assert sorted(urls) == sorted(router_urls(found["servers"]))
    assert found["controller"]["up"] and found["problem"] == ""
    for tier in ("vision", "language", "router"):
        servers = [server for server in found["servers"] if server["tier"] == tier]
        assert [server["state"] for server in servers] == ["ready", "ready"]
        assert len({server["node"] for server in servers}) == 2  # spread
    assert json.loads(operator.done("status", "--json"))["servers"][0]["server"] == "vision-0"
    table = operator.done("status", "acts")
    assert "vision 2/2, language 2/2, router 2/2" in table
    assert "is up already: dvd down acts first" in operator.refused("up", operator.file("acts"))


def test_a_lost_node_costs_what_it_was_working_on_and_comes_back_elsewhere(operator, raylets):
    servers = operator.look()["servers"]
    # Its routers take their connections with them; the clients of this test have no other to go to.
    victim = next(ip for ip in raylets.nodes if any(s["node"] == ip and s["tier"] == "vision" for s in servers))
    urls = [url for url in router_urls(servers) if victim not in url]
    lost = [server["server"] for server in servers if server["node"] == victim]
    with Traffic(urls) as traffic:
        traffic.wait_for(10)
        assert traffic.failures == {}
        kill_node(raylets, victim, servers)
        traffic.wait_for(10)
        operator.wait_well()
        before = dict(traffic.failures)
        traffic.wait_for(20)
    print(f"\nnode with {', '.join(lost)} lost: {traffic.num_ok} answered, failed: {traffic.failures or 0}")
    assert traffic.failures == before  # none once everybody was back
    assert sum(before.values()) <= 2  # the requests that were open then
    assert {server["node"] for server in operator.look()["servers"]} == set(raylets.nodes)


def test_a_controller_that_dies_is_started_anew_and_takes_over(operator, raylets):
    before = {server["replica"] for server in operator.wait_well()["servers"]}
    (controller,) = raylets.pids_of("ray::Controller")
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: raylets.pids_of("ray::Controller") not in ([], [controller]))
    found = wait_until(lambda: (seen := operator.look())["controller"]["up"] and seen)
    assert {server["replica"] for server in found["servers"]} == before


def test_a_server_that_is_killed_comes_back(operator, raylets):
    """Its keeper tells; a keeper that is killed takes its server along."""
    found = operator.wait_well()
    first, second = (server for server in found["servers"] if server["tier"] == "language")
    with Traffic(router_urls(found["servers"])) as traffic:
        os.kill(first["pid"], signal.SIGKILL)
        traffic.wait_for(5)
        operator.wait_well()
    print(f"\nlanguage server killed: {traffic.num_ok} answered, failed: {traffic.failures or 0}")
    replicas = {server["replica"] for server in operator.servers("language")}
    assert first["replica"] not in replicas and second["replica"] in replicas


def test_a_raylet_that_dies_leaves_its_servers_to_drain(operator, raylets):
    """Ray gives the node up and fills its places elsewhere; the keepers hear of it from the head."""
    raylets.add("127.0.0.5")
    servers = operator.wait_well()["servers"]
    victim = next(server["node"] for server in servers if server["tier"] == "language")
    left = [server for server in servers if server["node"] == victim]
    with Traffic([url for url in router_urls(servers) if victim not in url]) as traffic:
        traffic.wait_for(5)
        raylets.kill_raylet(victim)
        wait_until(lambda: not any(Path(server["directory"]).exists() for server in left), what="for the keepers")
        operator.wait_well()
        traffic.wait_for(5)
    print(f"\nraylet killed under {len(left)} servers: {traffic.num_ok} answered, failed: {traffic.failures or 0}")
    assert traffic.failures == {}


def test_vision_grows_and_shrinks_under_load_without_an_error(operator):
    operator.done("scale", "vision=1")
    found = operator.wait_well()
    urls = router_urls(found["servers"])
    with Traffic(urls, num_clients=1) as quiet, Traffic(urls, num_clients=2) as step:
        operator.done("scale", "acts", "vision=3")
        assert len([s for s in operator.wait_well()["servers"] if s["tier"] == "vision"]) == 3
        step.wait_for(10)
        operator.done("scale", "vision=1")
        assert len([s for s in operator.wait_well()["servers"] if s["tier"] == "vision"]) == 1
        quiet.wait_for(5)
    print(
        f"\nvision 1 -> 3 -> 1: {quiet.num_ok + step.num_ok} answered, failed: {quiet.failures or step.failures or 0}"
    )
    assert quiet.failures == {} and step.failures == {}


def test_down_leaves_nothing(operator, raylets, environ, shared_memory):
    addresses = [server["address"] for server in operator.wait_well()["servers"]]
    assert all(map(is_listening, addresses))
    assert raylets.our_processes()
    assert operator.done("down") == ""
    wait_until(lambda: not raylets.our_processes(), 10)
    assert not any(map(is_listening, addresses))
    assert list(Path(environ["TMPDIR"]).glob("dvd-*")) == []
    assert [name for name in set(os.listdir("/dev/shm")) - shared_memory if "dvd" in name] == []
    assert list(Path(environ["XDG_STATE_HOME"]).rglob("*.json")) == []
    assert "no cluster was started from this machine" in operator.refused("status")
    assert operator.done("down", "acts") == ""  # again: harmless
    operator.close()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as other:
        yield other.getsockname()[1]


def test_what_cannot_be_is_one_line_and_leaves_nothing(operator, raylets, environ, busy_port):
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"model": "/nowhere"}, r"on 127\.0\.0\.\d: model /nowhere: no such directory; download the checkpoint first"),
        (
            {"routers": {"port": busy_port}},
            rf"on 127\.0\.0\.\d: router-0 .*cannot listen on 127\.0\.0\.\d:{busy_port}: .*in use",
        ),
        (
            {"language": {"options": {"kv_cache_bytes": 10**15}}},
            r"on 127\.0\.0\.\d: language-0 ended with status 2: language server cannot start: .* use a smaller model",
        ),
        (
            {"insecure_network": False, "keys": None, "api_keys": ["k"]},
            r"servers on .* will listen there without encryption or keys",
        ),
    ]
    files = [operator.file(f"mistake-{index}", **changes) for index, (changes, _) in enumerate(mistakes)]
    with ThreadPoolExecutor(len(files)) as pool:
        lines = list(pool.map(lambda file: operator.refused("up", file), files))
    for line, (_, expected) in zip(lines, mistakes, strict=True):
        assert re.fullmatch(f"dvd: error: {expected}.*", line)
    assert list(Path(environ["XDG_STATE_HOME"]).rglob("*.json")) == []
    wait_until(lambda: not raylets.our_processes(), 10)
    assert list(Path(environ["TMPDIR"]).glob("dvd-*")) == []


def test_vision_follows_a_load_step_by_itself(operator):
    rules = {
        "interval": 0.5,
        "vision_drain_seconds": 0.05,
        "confirmations": 2,
        "cooldown_up": 1,
        "cooldown_down": 4,
    }
    operator.done("up", operator.file("alone", vision={"max_replicas": 3}, autoscale=rules))
    urls = router_urls(operator.look()["servers"])
    with Traffic(urls, num_clients=8, pause=0) as traffic:
        wait_until(lambda: operator.look()["groups"]["vision"]["desired"] == 3, what="for growth")
        operator.wait_well()
        traffic.wait_for(10)
    wait_until(lambda: operator.look()["groups"]["vision"]["desired"] == 1, what="for shrinking")
    with Traffic(urls, num_clients=1) as after:
        operator.wait_well()
        after.wait_for(5)
    print(f"\nload step, vision 1 -> 3 -> 1: {traffic.num_ok} answered, failed: {traffic.failures or 0}")
    assert traffic.failures == {} and after.failures == {}


def test_a_lost_head_stops_scaling_not_serving(operator, raylets, environ):
    found = operator.wait_well()
    with Traffic(router_urls(found["servers"])) as traffic:
        raylets.kill_head()
        wait_until(lambda: not raylets.pids_of("raylet/raylet"), what="for the raylets to give up")
        wait_until(lambda: not raylets.pids_of("ray::Replica"))
        wait_until(lambda: all("does not answer" in log for log in keeper_logs(found["servers"])))
        traffic.wait_for(20)
    print(f"\nhead lost: {traffic.num_ok} answered, failed: {traffic.failures or 0}")
    assert traffic.failures == {}
    seen = operator.look()
    assert not seen["controller"]["up"]
    assert [server["state"] for server in seen["servers"]] == ["ready"] * len(found["servers"])
    assert operator.run("status").returncode == 1
    assert "controller lost" in operator.run("status").stdout
    assert "cannot scale: the Ray head at" in operator.refused("scale", "vision=2")
    assert operator.done("down") == ""
    wait_until(lambda: not raylets.our_processes(), 10)
    assert list(Path(environ["TMPDIR"]).glob("dvd-*")) == []


def keeper_logs(servers: list[dict[str, Any]]) -> list[str]:
    return [(Path(server["directory"]) / "log").read_text() for server in servers]
