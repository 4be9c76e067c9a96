"""One after the other, in one process, behind the same gRPC: what ``dvd serve --colocated`` adds to the two servers."""

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
import torch
import yaml

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.service import metrics, rpc
from common.service.announce import Announcement
from common.service.errors import Cancelled, ConfigError, TransportFailed
from deploy import colocated
from deploy.client import ChatClient, user_message
from deploy.colocated import ColocatedServer, DeviceTurn, LocalTransport
from deploy.demo import questions
from deploy.settings import NANO, ColocatedSettings, ServeSettings
from language_server.engine import LanguageEngine
from language_server.engine_thread import EngineThread
from language_server.sequence import SamplingParams, Sequence
from protos.frame import FrameHeader, FrameRejected, pack_header, with_checksum
from protos.language_pb2 import Admitted, ImageRef
from protos.language_pb2_grpc import LanguageStub
from protos.status_pb2 import Endpoint
from protos.vision_pb2 import EncodeRequest, TilingOptions
from protos.vision_pb2_grpc import VisionStub
from tests.checkpoints import RandomCheckpoint, make_checkpoint
from tests.deploy.test_local import children_of, is_alive
from tests.language_server.conftest import Reply, make_request
from tests.language_server.messages import message
from tests.language_server.test_engine_thread import FakeEngine, Sink
from tests.vision_server.neighbours import TICKET, FeatureSink, encoded, picture
from vision_server.batcher import Batcher
from vision_server.compute import ComputeThread
from vision_server.encoder import Kind, Projected, VisionEncoder
from vision_server.host_link import Done

DEADLINE = 60.0


def wait_until(is_true: Callable[[], bool]) -> None:
    """In a thread. What is waited for is another thread's arrival in line, which leaves no event."""
    give_up = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def line_is(turn: DeviceTurn, length: int) -> Callable[[], bool]:
    return lambda: turn.num_waiting == length


# --- whose turn it is


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    turn, order = DeviceTurn(), []

    def ask(number: int) -> None:
        with turn:
            order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    with turn:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(line_is(turn, number + 1))
        assert order == []
    for thread in threads:
        thread.join(DEADLINE)
    assert order == list(range(8))
    assert turn.num_waiting == 0


def test_a_turn_that_ends_badly_ends():
    turn = DeviceTurn()
    with pytest.raises(RuntimeError), turn:
        raise RuntimeError
    with turn:
        pass


class Witness:
    """Stands where both sides compute: nobody may come in while somebody is there, and nobody leaves before the other
    has asked, so that both always want the device. Until ``is_closing``."""

    def __init__(self, turn: DeviceTurn) -> None:
        self.turn = turn
        self.seen: list[str] = []
        self.is_closing = False
        self._inside = threading.Lock()

    def compute(self, who: str) -> None:
        assert self._inside.acquire(blocking=False), "the other side is computing"
        self.seen.append(who)
        wait_until(lambda: self.turn.num_waiting > 0 or self.is_closing)
        self._inside.release()


async def test_a_batch_and_a_step_never_overlap_and_alternate():
    turn = DeviceTurn()
    witness = Witness(turn)

    class Encoder:
        depth = 2  # ignored: a batch that is under way at the end of a turn would overlap with a step

        def launch(self, kind: Kind, parts: Items[np.ndarray]) -> Done[Items[torch.Tensor]]:
            witness.compute("batch")
            return Done([torch.zeros(len(part), 4, 2) for part in parts])

        def project(self, patches: Items[torch.Tensor], compressed: Items[bool]) -> Done[Projected]:
            raise AssertionError("there is nothing to project")

        def release_memory(self) -> None: ...

    class Engine(FakeEngine):
        def step(self, *_limits):
            witness.compute("step")
            return super().step()

    compute = ComputeThread(Encoder(), Batcher(1, 64), turn=turn)
    engine = EngineThread(max_num_live=1, turn=turn)
    compute.start()
    engine.start(cast(LanguageEngine, Engine()))
    image = compute.admit()
    compute.resize(image, 20)
    try:
        engine.add([Sequence(1, bytes(16), [1], SamplingParams(max_tokens=9))], Sink())
        async with asyncio.timeout(DEADLINE):
            features = compute.encode(image, np.zeros((20, 2, 2, 3), dtype=np.uint8), torch.float32)
            groups = [group async for group in features]
    finally:
        witness.is_closing = True
        ended = await asyncio.gather(engine.stop(DEADLINE), compute.stop(DEADLINE))
    assert len(groups) == 20 and all(ended)
    # From the first change of sides to the last tile both always wanted the device.
    sides = "".join(who[0] for who in witness.seen)
    assert sides.strip("s").lstrip("b").startswith("sb" * 15), sides


# --- features


def frame() -> tuple[bytes, bytes]:
    """A signed header and its payload: one tile of 2 x 3 float32."""
    payload = bytes(24)
    header = FrameHeader(bytes(16), bytes(16), 0, 0, 0, 1, 3, "float32", (2,), 0)
    return pack_header(with_checksum(header, payload), TICKET), payload


async def test_a_frame_goes_through_the_same_checks_as_over_a_socket():
    transport, sink = LocalTransport(), FeatureSink()
    endpoint = await transport.start(sink)
    header, payload = frame()
    assert await transport.send([Endpoint(transport="zmq", address="tcp://x"), endpoint], header, payload, 1) == "local"
    assert [each.num_tokens for each in sink.frames] == [2]
    with pytest.raises(FrameRejected) as damaged:
        await transport.send([endpoint], header, b"\1" * 24, 1)
    assert damaged.value.reason == "checksum"
    with pytest.raises(FrameRejected) as short:
        await transport.send([endpoint], header, payload[1:], 1)
    assert short.value.reason == "size"


async def test_a_frame_for_another_process_is_not_taken():
    ours, theirs = LocalTransport(), LocalTransport()
    await ours.start(FeatureSink())
    with pytest.raises(TransportFailed):
        await ours.send([await theirs.start(FeatureSink())], *frame(), 1)
    await theirs.close()
    with pytest.raises(TransportFailed):
        await theirs.send([theirs._endpoint], *frame(), 1)


# --- both servers as one worker


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> RandomCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("colocated") / "checkpoint")


@pytest.fixture
def settings(checkpoint, tmp_path) -> ColocatedSettings:
    options: dict[str, Any] = {"model": checkpoint.path, "dtype": "float32", "threads": 1}
    tiers = {tier: {"listen": f"unix:{tmp_path}/{tier}", **options} for tier in ("vision", "language")}
    return ColocatedSettings.model_validate({"announce": tmp_path / "announced", "metrics_listen": None, **tiers})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Router:
    """As far as one request with one picture of one tile is concerned."""

    def __init__(self, settings: ColocatedSettings) -> None:
        self._channels = [rpc.make_channel(tier.listen) for tier in (settings.vision, settings.language)]
        self.vision, self.language = VisionStub(self._channels[0]), LanguageStub(self._channels[1])
        self.request = make_request([message("user", 0, "What is it?")])
        self.request.images.append(ImageRef(mm_hash=bytes(32), max_num_tokens=256))

    async def admit(self, call) -> Admitted:
        event = await call.read()
        assert event.WhichOneof("event") == "admitted"
        return event.admitted

    async def encode(self, admitted: Admitted):
        call = EncodeRequest(
            request_id=self.request.request_id,
            mm_hash=bytes(32),
            image_hash=bytes(32),
            image=encoded(picture()),
            tiling=TilingOptions(min_dynamic_patch=1, max_dynamic_patch=1, use_thumbnail=False),
            deliver_to=admitted.deliver_to,
            ticket=admitted.missing[0].ticket,
            dtype=admitted.dtype,
        )
        return await self.vision.Encode(call, timeout=DEADLINE)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def rest_of(call):
    """Events of a Generate call after its first."""
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event


@pytest.fixture
async def router(settings) -> AsyncIterator[Router]:
    router = Router(settings)
    yield router
    await router.close()


@asynccontextmanager
async def started(settings: ColocatedSettings) -> AsyncIterator[ColocatedServer]:
    server = ColocatedServer(settings)
    await server.start()
    try:
        yield server
    finally:
        assert await server.close()


async def test_what_was_admitted_gets_its_features_while_the_server_drains(settings, router):
    async with started(settings) as server:
        await server.load()
        await drain_with_a_request_inside(server, router)


async def drain_with_a_request_inside(server: ColocatedServer, router: Router) -> None:
    call = router.language.Generate(router.request, timeout=DEADLINE)
    admitted = await router.admit(call)
    draining = asyncio.create_task(server.drain())
    await asyncio.sleep(0)  # it has begun: nothing new comes in
    with pytest.raises(grpc.aio.AioRpcError, match="draining"):
        await router.language.Generate(make_request("Hello"), timeout=DEADLINE).read()
    assert (await router.encode(admitted)).transport == "local"
    reply = Reply()
    reply.admitted = admitted
    async for event in rest_of(call):
        reply.add(event)
    assert reply.finished[0].usage.image_tokens == 256
    await asyncio.wait_for(draining, DEADLINE)
    assert not server.ended.done()


async def test_turns_are_large_unless_told_otherwise(settings):
    vision = settings.vision.model_copy(update={"max_batch_tiles": 3})
    language = settings.language.model_copy(update={"max_prefill_stretch": 2.0})
    for given, tiles, stretch in (
        (settings, 8, 1e6),
        (settings.model_copy(update={"vision": vision, "language": language}), 3, 2.0),
    ):
        async with started(given) as server:
            assert server.vision.settings.max_batch_tiles == tiles
            assert server.language.settings.max_prefill_stretch == stretch


async def test_loading_can_be_aborted(settings):
    async with started(settings) as server:
        server.abort_load()
        with pytest.raises(Cancelled):
            await server.load()
        assert Announcement.read(settings.announce) is None


@pytest.fixture
def root_logger() -> Iterator[None]:
    """``main`` takes over the process's logging: put pytest's back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    "section, option, complaint",
    [
        ("language", {"max_model_len": 10**9}, "max_model_len 1000000000 is above the model's own limit"),
        ("language", {"listen": "192.0.2.1:1"}, "192.0.2.1:1"),
        ("vision", {"model": "/nowhere"}, "nowhere"),
        ("vision", {"max_bach_tiles": 3}, "vision.max_bach_tiles"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_start_says_why_in_one_line(settings, tmp_path, capsys, section, option, complaint):
    options = settings.model_dump(mode="json", exclude={"config", "dump_config", "announce"})
    tiers = {
        tier: {"model": options[tier]["model"], "listen": options[tier]["listen"]} for tier in ("vision", "language")
    }
    tiers[section] |= option
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({**tiers, "metrics_listen": None}))
    assert colocated.main(["--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("colocated server cannot start: ") and complaint in line


async def test_both_sides_must_fit_together(settings, monkeypatch):
    """Each of them fits alone."""
    checkpoint = Checkpoint.open(settings.vision.model)
    each = [memory.weight_bytes(checkpoint, role, torch.float32) for role in ("vision", "language")]
    monkeypatch.setattr(memory, "free_bytes", lambda device: max(each))
    with pytest.raises(ConfigError, match=r"the colocated server needs .* \(vision weights .*, language weights .*\)"):
        ColocatedServer(settings)


def test_one_page_of_metrics_for_both_tiers():
    page = metrics.exposition("colocated").decode()
    assert "dvd_vision_tiles_total" in page
    assert "dvd_language_prompt_tokens_total" in page
    assert "dvd_http_requests" not in page


def broken_launch(encoder, kind, parts):
    raise torch.AcceleratorError("the vision side's device is gone")


def broken_step(engine, *_limits):
    raise RuntimeError("the language side has a bug")


@pytest.mark.parametrize(
    "broken, name, replacement, reason",
    [
        (VisionEncoder, "launch", broken_launch, "the vision side's device is gone"),
        (LanguageEngine, "step", broken_step, "the language side has a bug"),
    ],
    ids=["vision", "language"],
)
async def test_the_death_of_either_side_ends_the_process(
    settings, router, monkeypatch, caplog, broken, name, replacement, reason
):
    running = asyncio.create_task(colocated.run(settings))
    async with asyncio.timeout(DEADLINE):
        while Announcement.read(settings.announce) is None:
            await asyncio.sleep(0.02)
    monkeypatch.setattr(broken, name, replacement)
    call = router.language.Generate(router.request, timeout=DEADLINE)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await router.encode(await router.admit(call))
        async for _ in rest_of(call):
            pass
    # Told by the side that died, or cut off when the process hangs up: to a router either is a server lost.
    assert failure.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert await asyncio.wait_for(running, DEADLINE) == 1
    (record,) = (each for each in caplog.records if each.levelno == logging.CRITICAL)
    assert "colocated server" in record.message
    assert record.exc_info is not None and str(record.exc_info[1]) == reason


# --- `dvd serve --colocated`


@pytest.mark.parametrize(
    "flags",
    [
        ["--vision-servers=2"],
        ["--language-servers=2"],
        ["--vision-devices=cuda:0"],
        ["--language-devices=cuda:1"],
        ["--vision-cores=0"],
        ["--language-cores=0-1"],
        ["--vision-nice=0"],
        ["--transports=grpc"],
    ],
    ids=lambda flags: flags[0],
)
def test_what_divides_the_tiers_is_refused_in_one_line(flags):
    with pytest.raises(ConfigError) as refusal:
        ServeSettings.load(["--model=nano", "--colocated", *flags])
    flag = flags[0].partition("=")[0]
    assert refusal.value.message == f"{flag} cannot be combined with --colocated: both tiers are one process then"
    ServeSettings.load(["--model=nano", *flags])


def test_what_divides_nothing_may_be_said():
    arguments = ["--model=nano", "--colocated", "--vision-servers=1", "--max-batch-tiles=4", "--max-num-seqs=7"]
    settings = ServeSettings.load(arguments)
    assert (settings.colocated, settings.max_batch_tiles, settings.max_num_seqs) == (True, 4, 7)


@pytest.fixture
def serve() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """``dvd serve nano --colocated`` as a user starts it, and where its files are; ended whatever the test does."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:  # short, as socket paths are
        command = [sys.executable, "-m", "deploy.cli", "serve", "nano", "--colocated", "--port=0", "--log-level=error"]
        process = subprocess.Popen(
            [*command, "--enable-per-request-metrics"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": directory},
        )
        yield process, Path(directory)
        process.kill()
        process.communicate()


def test_it_answers_as_one_process_whose_end_is_the_end(serve):
    process, directory = serve
    ready = re.fullmatch(r"ready at (http://127\.0\.0\.1:\d+) model nano colocated x1\n", process.stdout.readline())
    assert ready, process.stderr.read()
    with ChatClient(ready[1]) as client:
        for asked in questions():
            content = [user_message(asked.question, [asked.image])]
            assert "".join(client.stream(content, model=NANO, temperature=0, max_tokens=32)) == asked.answer
            assert client.last is not None and client.last.metrics["dvd"]["transport"] == "local"
    children = {Path(f"/proc/{pid}/cmdline").read_text().split("\0")[2]: pid for pid in children_of(process.pid)}
    assert set(children) == {"deploy.colocated", "router"}
    os.kill(children["deploy.colocated"], signal.SIGKILL)
    output, log = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output) == (1, "")
    assert re.match(r"dvd serve: colocated ended with signal SIGKILL: ", log.splitlines()[-1])
    assert not any(is_alive(pid) for pid in children.values())
    assert list(directory.glob("dvd-*")) == []
