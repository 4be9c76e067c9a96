"""The program as an operator meets it: one ready line, a drain on SIGTERM, a clear word when it cannot start."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from common.service import announce, rpc
from common.service.errors import Cancelled, ConfigError
from common.service.program import stop_signal
from protos.status_pb2 import Endpoint
from protos.vision_pb2_grpc import VisionStub
from tests.vision_server.neighbours import encoded, make_request, picture
from vision_server import __main__ as program
from vision_server.encoder import VisionEncoder
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings(checkpoint, tmp_path) -> VisionSettings:
    arguments = ["--listen", "127.0.0.1:0", "--metrics-listen", "null", "--announce", str(tmp_path / "vision.json")]
    return VisionSettings.load(["--model", str(checkpoint.path), *arguments])


@pytest.fixture
def root_logger() -> Iterator[None]:
    """``main`` takes over the process's logging: put pytest's back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def threads_of(pid: int) -> list[int]:
    """Ids of a process's threads, the main one first."""
    return sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())


def test_ready_then_drain_on_sigterm(checkpoint, tmp_path):
    announced = tmp_path / "vision.json"
    command = [sys.executable, "-m", "vision_server", "--model", str(checkpoint.path), "--listen", "127.0.0.1:0"]
    command += ["--announce", str(announced), "--nice", "1", "--threads", "1", "--name", "left"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            facts = json.loads(announced.read_text())
            assert line.startswith(f"vision server ready at {facts['address']} model {checkpoint.path.name} ")
            assert (facts["name"], facts["role"], facts["pid"]) == ("left", "vision", process.pid)
            nice = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads_of(process.pid)]
            assert nice[0] == os.nice(0)  # the event loop answers, whoever else wants the cores
            assert min(os.nice(0) + 1, 19) in nice[1:]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.usefixtures("root_logger")
def test_what_cannot_start_says_why(tmp_path, capsys):
    assert program.main(["--model", str(tmp_path), "--metrics-listen", "null"]) == 2
    assert capsys.readouterr().err.startswith("vision server cannot start: no config.json")
    assert program.main(["--model", str(tmp_path), "--max-bach-tiles", "3"]) == 2
    assert "--max-batch-tiles" in capsys.readouterr().err


@pytest.mark.usefixtures("root_logger")
def test_a_checkpoint_that_does_not_fit_its_config_says_why(checkpoint, tmp_path, capsys):
    broken = shutil.copytree(checkpoint.path, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (broken / "config.json").write_text(json.dumps(config))
    assert program.main(["--model", str(broken), "--listen", "127.0.0.1:0", "--metrics-listen", "null"]) == 2
    assert "vision_model.encoder.layers.2." in capsys.readouterr().err


def test_the_largest_image_must_fit_into_the_queue():
    with pytest.raises(ConfigError, match="max_queued_tiles"):
        VisionSettings.load(["--model", "x", "--max-queued-tiles", "40"])


async def test_an_address_in_use_is_a_config_error(settings):
    first = VisionServer(settings)
    await first.start()
    second = VisionServer(settings.model_copy(update={"listen": first.address}))
    with pytest.raises(ConfigError, match="listen"):
        await second.start()
    await first.close()
    await second.close()


async def test_loading_can_be_aborted(settings):
    server = VisionServer(settings)
    await server.start()
    server.abort_load()
    with pytest.raises(Cancelled):
        await server.load()
    assert announce.Announcement.read(settings.announce) is None
    await server.close()


async def test_a_server_that_is_loading_says_so(settings):
    server = VisionServer(settings)
    await server.start()
    async with rpc.make_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await VisionStub(channel).Encode(make_request(encoded(picture()), []), timeout=30)
        assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
        assert dict(failure.value.trailing_metadata())["dvd-code"] == "not_ready"
    await server.close()


async def test_a_dead_device_thread_ends_the_process(settings, monkeypatch, capsys):
    running = asyncio.create_task(program.run(settings))
    async with asyncio.timeout(60):
        while (facts := announce.Announcement.read(settings.announce)) is None:
            await asyncio.sleep(0.02)

    def broken(encoder, kind, parts):
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(VisionEncoder, "launch", broken)
    async with rpc.make_channel(facts.address) as channel:
        request = make_request(encoded(picture()), [Endpoint(transport="zmq", address="tcp://127.0.0.1:1")])
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await VisionStub(channel).Encode(request, timeout=30)
        assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    assert await asyncio.wait_for(running, 60) == 1
    assert "vision server ready at" in capsys.readouterr().err


async def test_the_second_signal_does_not_wait(monkeypatch):
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stopping = stop_signal()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stopping.wait(), 30)
    assert exits == []
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(30):
        while not exits:
            await asyncio.sleep(0.01)
    assert exits == [1]
