"""Systems under test start, answer, and leave nothing; a peer is a program that answers /health."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.systems import Dvd, Vllm
from common.service.errors import ConfigError, Unavailable

PEER = """#!{python}
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def peer(directory: Path, text: str) -> Vllm:
    program = directory / "vllm"
    program.write_text(text.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return Vllm(program, "nano", "float32")


def test_a_peer_and_all_it_started_end_with_the_block(tmp_path):
    with peer(tmp_path, PEER).serving() as target:
        child = int(httpx.get(f"{target.base_url}/health", trust_env=False).text)
        assert Path(f"/proc/{child}").exists()
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True, check=False).stdout
    assert not state.strip() or state.startswith("Z")


def test_a_peer_that_does_not_start_is_quoted(tmp_path):
    failing = peer(tmp_path, "#!{python}\nraise SystemExit('no such device')\n")
    with pytest.raises(Unavailable, match="ended with status 1: no such device"), failing.serving():
        pass


def test_commands_can_be_typed():
    assert Dvd("any", "nano", {"colocated": True, "vision_cores": [2, 3]}, frozenset({1, 0})).command == (
        "taskset -c 0,1 dvd serve nano --colocated --vision-cores=2,3"
    )
    assert Vllm(Path("vllm"), "nano", "bfloat16").command.startswith("HF_HUB_OFFLINE=1 ")


def test_cores_that_are_not_ours_are_refused_before_anything_starts():
    before = os.sched_getaffinity(0)
    system = Dvd("any", "nano", {}, frozenset({max(before) + 1}))
    with pytest.raises(ConfigError, match="this process may use"), system.serving():
        pass
    assert os.sched_getaffinity(0) == before
