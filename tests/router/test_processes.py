"""Several real router processes behind one port: one address, bounds that are divided, one end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from router.__main__ import main
from router.admission import share
from router.server import RouterServer
from router.settings import RouterSettings
from tests.router.conftest import CHAT, user
from tests.router.fakes import FakeLanguage, FakeVision

NUM_WORKERS = 2
SAID = re.compile(r"router process (\d) \(pid (\d+)\): metrics at (\S+)")


@dataclass
class Program:
    """The parent, and what was read of its children."""

    process: asyncio.subprocess.Process
    language: FakeLanguage
    url: str = ""
    metrics: dict[int, str] = field(default_factory=dict)  # index -> where
    pids: dict[int, int] = field(default_factory=dict)

    async def read(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The next line of the log that matches; where metrics are is kept."""
        assert self.process.stderr is not None
        said = []
        async with asyncio.timeout(60):
            while line := (await self.process.stderr.readline()).decode():
                said.append(line)
                if start := SAID.search(line):
                    self.metrics[int(start[1])], self.pids[int(start[1])] = start[3], int(start[2])
                if found := pattern.search(line):
                    return found
        raise AssertionError(f"the program never said {pattern.pattern}: {''.join(said)}")

    async def counted(self, name: str) -> dict[int, float]:
        """A counter of each process."""
        found = {}
        async with httpx.AsyncClient(timeout=20) as client:
            for index, address in self.metrics.items():
                text = (await client.get(f"http://{address}/metrics")).text
                samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
                assert {sample.labels["worker"] for sample in samples} == {str(index)}
                found[index] = sum(sample.value for sample in samples if sample.name == name)
        return found


async def ask(program: Program, content: str = "hello") -> httpx.Response:
    """On a connection of its own."""
    async with httpx.AsyncClient(base_url=program.url, timeout=20) as client:
        return await client.post(CHAT, json={"messages": [user(content)]})


@asynccontextmanager
async def running_program(tmp_path: Path) -> AsyncIterator[Program]:
    language = FakeLanguage()
    vision = FakeVision([language])
    for worker in (language, vision):
        await worker.start()
    announcement = tmp_path / "router.json"
    servers = ["--vision", vision.address, "--language", language.address]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--workers", str(NUM_WORKERS), "--port", "0", *servers),
        *("--announce", str(announcement)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("DVD_")},
    )
    program = Program(process, language)
    try:
        for _ in range(NUM_WORKERS):
            await program.read(SAID)
        assert process.stdout is not None
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert ready.strip().endswith("model fake vision x1 language x1")
        announced = json.loads(announcement.read_text())
        assert announced["pid"] == process.pid
        program.url = f"http://{announced['address']}"
        assert program.url in ready
        yield program
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        for worker in (language, vision):
            await worker.stop()


async def test_they_answer_at_one_address_count_apart_are_replaced_and_end(tmp_path):
    async with running_program(tmp_path) as program:
        assert len(program.pids) == NUM_WORKERS
        for _ in range(4):
            assert (await ask(program)).status_code == 200
        counted = await program.counted("dvd_http_requests_total")
        assert sum(counted.values()) == 4

        dead = program.pids[0]
        os.kill(dead, signal.SIGKILL)
        assert (await program.read(re.compile(r"router process 0 .* ended with (.*): replaced in 1 s")))[
            1
        ] == "signal 9"
        assert (await ask(program)).status_code == 200  # by the other one, meanwhile
        await program.read(SAID)
        assert program.pids[0] != dead
        async with asyncio.timeout(20):
            while (await program.counted("dvd_http_requests_total"))[0] == 0:  # until it has had one
                await asyncio.gather(*(ask(program) for _ in range(4)))

        program.process.send_signal(signal.SIGTERM)  # which is enough to end all
        for _ in range(NUM_WORKERS):
            await program.read(re.compile("draining: "))
        assert await asyncio.wait_for(program.process.wait(), 30) == 0


async def test_all_drain_at_one_signal_to_each(tmp_path):
    """As a service manager sends it: nobody takes the parent's word for a second one."""
    async with running_program(tmp_path) as program:
        program.language.at_token.is_open.clear()
        asked = [asyncio.create_task(ask(program)) for _ in range(4)]
        await program.language.at_token.wait_for(lambda gate: gate.num_entered == 4)
        for pid in program.pids.values():
            os.kill(pid, signal.SIGTERM)
        program.process.send_signal(signal.SIGTERM)
        for _ in range(NUM_WORKERS):
            await program.read(re.compile("draining: .* requests are running"))
        program.language.at_token.is_open.set()
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
        assert await asyncio.wait_for(program.process.wait(), 30) == 0


async def test_no_orphan_outlives_the_parent(tmp_path):
    async with running_program(tmp_path) as program:
        program.process.kill()
        await program.process.wait()
        async with asyncio.timeout(20):
            for pid in program.pids.values():
                while is_alive(pid):
                    await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_stops_one_at_the_start_stops_all():
    arguments = ["--port", "0", "--vision", "127.0.0.1:1", "--language", "127.0.0.1:1", "--workers", "2"]
    command = [sys.executable, "-m", "router", *arguments, "--worker-metrics-listen", "192.0.2.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--worker-metrics-listen" in ended.stderr


def test_a_taken_port_is_told_once(capfd):
    assert (
        main(["--uds", "/no/such/place", "--vision", "127.0.0.1:1", "--language", "127.0.0.1:1", "--workers", "2"]) == 2
    )
    assert capfd.readouterr().err.count("cannot start") == 1


async def test_bounds_are_divided():
    servers = ["--vision", "127.0.0.1:1", "--language", "127.0.0.1:1"]
    bounds = ["--max-num-queued-reqs", "5", "--max-num-queued-image-reqs", "1", "--max-held-body-bytes", "10"]
    router = RouterServer(RouterSettings.load([*servers, *bounds, "--workers", "2"]))
    limits = router.admission._limits
    assert limits.max_waiting == {"text": 3, "image": 1}
    assert limits.max_held_bytes == 5
    assert [share(places, 4) for places in (0, 1, 4, 5)] == [0, 1, 1, 2]
    await router.fleet.close()


STUCK = """
import signal, sys, time
from router.processes import Processes

def serve(place):
    place.tell_ready("stuck")
    time.sleep(60)

sys.exit(Processes(2, serve, lambda line: print(line, flush=True), drain_seconds=0.3).run())
"""


def test_who_is_stuck_in_a_drain_is_given_up():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "stuck\n"
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=20) == 1
