"""What cannot start says so in one line, exits with status 2, and leaves no process behind. The real programs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.service.errors import StartupError
from deploy.local import LocalDeployment
from deploy.settings import NANO, ServeSettings, model_directory

DEADLINE = 100.0
ROUTER = ("router", "--vision=127.0.0.1:1", "--language=127.0.0.1:1")
VISION = ("vision", "--listen=127.0.0.1:0")
LANGUAGE = ("language", "--listen=127.0.0.1:0")


@pytest.fixture(scope="module")
def values() -> Iterator[dict[str, str]]:
    """What the cases below need, by the name they use for it."""
    with tempfile.TemporaryDirectory(prefix="dvd-") as directory, socket.create_server(("127.0.0.1", 0)) as busy:
        root = Path(directory)
        (root / "empty").mkdir()
        (root / "wrong.yaml").write_text("vision: [a\nlanguage: b\n")
        yield {
            "@BUSY": f"127.0.0.1:{busy.getsockname()[1]}",
            "@PORT": str(busy.getsockname()[1]),
            "@DIR": directory,
            "@TRUNCATED": str(changed_nano(root / "truncated", truncated)),
            "@HUGE": str(changed_nano(root / "huge", huge)),
        }


def changed_nano(path: Path, change: Callable[[bytes], tuple[bytes, int]]) -> Path:
    """The nano checkpoint with other weights: what they begin with, and how long the file is made."""
    shutil.copytree(model_directory(NANO), path)
    weights = path / "model.safetensors"
    begin, size = change(weights.read_bytes())
    weights.write_bytes(begin)
    os.truncate(weights, size)
    return path


def truncated(weights: bytes) -> tuple[bytes, int]:
    return weights, len(weights) - 1000


def huge(weights: bytes) -> tuple[bytes, int]:
    """Every matrix a million times as high: a header, and a hole instead of terabytes."""
    length = int.from_bytes(weights[:8], "little")
    entries = json.loads(weights[8 : 8 + length])
    entries.pop("__metadata__", None)
    position = 0
    for entry in entries.values():
        begin, end = entry["data_offsets"]
        if len(entry["shape"]) == 2:
            entry["shape"][0] *= 10**6
            end = begin + (end - begin) * 10**6
        entry["data_offsets"] = [position, position + end - begin]
        position += end - begin
    packed = json.dumps(entries).encode()
    return len(packed).to_bytes(8, "little") + packed, 8 + len(packed) + position


CASES = [
    (("vision", NANO, "--listen=@BUSY"), r"cannot listen on @BUSY: in use; end what listens there"),
    ((*VISION, NANO, "--metrics-listen=@BUSY"), r"cannot listen on @BUSY \(--metrics-listen\): in use"),
    ((*VISION, "@DIR/absent"), r"model @DIR/absent: no such directory"),
    ((*VISION, "@TRUNCATED"), r"tensor '.*' in shard 'model.safetensors' is truncated: .*; download the shard again"),
    (
        (*VISION, "@HUGE"),
        r"the vision server needs \d+\.\d GB \(weights .* GB\), \d+\.\d GB free on cpu; use a",
    ),
    (
        ("language", NANO, "--listen=192.0.2.1:9101", "--insecure-network"),
        r"cannot listen on 192.0.2.1:9101: not an address of this machine",
    ),
    (("vision", NANO, "--listen=0.0.0.0:0"), r"--listen 0.0.0.0:0: other machines reach this address, .* --keys DIR"),
    ((*LANGUAGE, NANO, "--keys=@DIR/empty"), r"--keys @DIR/empty/ca.crt: No such file or directory"),
    ((*LANGUAGE, NANO, "--feature-listen=@BUSY"), r"cannot listen on @BUSY: in use"),
    ((*LANGUAGE, "@DIR/empty"), r"no config.json in 'empty'"),
    ((*LANGUAGE, NANO, "--kv-cash-bytes=1"), r"unknown flag --kv-cash-bytes; did you mean --kv-cache-bytes\?"),
    (
        (*LANGUAGE, NANO, "--tensor-parallel-size=3"),
        r"--tensor-parallel-size 3: num_attention_heads of this model is 4 and cannot be divided by it; allowed: 1, 2",
    ),
    (
        (*LANGUAGE, NANO, "--kv-cache-bytes=900000000000000"),
        r"needs 900000.0 GB \(weights 0.0 GB, --kv-cache-bytes 900000.0 GB\), .* a smaller --kv-cache-bytes",
    ),
    ((*ROUTER, "--port=@PORT"), r"cannot listen on @BUSY: in use"),
    ((*ROUTER, "--host=192.0.2.1"), r"cannot listen on 192.0.2.1:8000: not an address of this machine"),
    ((*ROUTER, "--vision=dns:nowhere"), r"--vision dns:nowhere: expected HOST:PORT, unix:/path, dns:NAME:PORT or"),
    (("router", "--config=@DIR/wrong.yaml"), r"--config @DIR/wrong.yaml: not YAML: .* line 2"),
]
# Importing torch and transformers takes longer than failing: one process has them, and each program is forked off it.
# Frozen: a fork that ends would look at all of their objects, and so copy them.
FORKING = """
import gc, json, os, sys
import deploy.cli, language_server.__main__, router.__main__, vision_server.__main__

gc.freeze()
for command in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.exit(deploy.cli.main(command))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os.killpg(pid, 9)
        left = True
    except ProcessLookupError:
        left = False
    print(json.dumps([status, left, open(sys.argv[2]).read()]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a program ended, whether something was left in its process group, and all it wrote."""

    status: int
    has_left_something: bool
    output: str


@pytest.fixture(scope="module")
def endings(values, tmp_path_factory) -> dict[tuple[str, ...], Ending]:
    commands = [[fill_in(argument, values) for argument in command] for command, _ in CASES]
    log = tmp_path_factory.mktemp("endings") / "log"
    forking = [sys.executable, "-c", FORKING, json.dumps(commands), str(log)]
    lines = subprocess.run(forking, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout.splitlines()
    return {command: Ending(*json.loads(line)) for (command, _), line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize(("command", "said"), CASES, ids=[" ".join(command) for command, _ in CASES])
def test_one_line_status_two_and_nothing_left(command, said, values, endings):
    ending = endings[command]
    title = {"vision": "vision server", "language": "language server"}.get(command[0], command[0])
    assert re.fullmatch(rf"{title} cannot start: .*\n", ending.output), ending.output
    escaped = {name: re.escape(value) for name, value in values.items()}
    assert re.search(fill_in(said, escaped), ending.output), ending.output
    assert (ending.status, ending.has_left_something) == (2, False)


def fill_in(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def test_dvd_serve_passes_it_on_in_one_line(values):
    deployment = LocalDeployment(ServeSettings(model=values["@HUGE"], port=0))
    with pytest.raises(StartupError) as failure:
        deployment.start()
    line = r"(vision|language) ended with status 2: \1 server cannot start: the \1 server needs .* GB free on cpu; .*"
    assert re.fullmatch(line, failure.value.message)
    assert deployment.processes == ()
