"""``python -m deploy.colocated --config FILE``: a vision and a language server in one process, one after the other.

The baseline that the divided system is compared with: the same code behind the same gRPC, so the router is the same.
Two things differ. Both sides share a ``DeviceTurn``: while one computes the other waits, so each has every core, or the
whole GPU, to itself. And features cross no socket: ``LocalTransport`` copies them into the feature store. Knows nothing
of tiles, tokens or requests.
"""

import asyncio
import secrets
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

import torch
from typing_extensions import Buffer

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.model.device import choose_device, choose_dtype
from common.model.names import Role
from common.service import announce, metrics
from common.service.errors import TransportFailed
from common.service.program import Progress, run_program, run_worker
from common.transport.base import FrameSink, receive_frame
from common.transport.meter import ReceiveMeter, SendMeter
from deploy.settings import ColocatedSettings
from language_server.quantization import NOT_QUANTIZED, choose_quantization
from language_server.server import LanguageServer
from language_server.settings import LanguageSettings
from protos.frame import FrameRejected
from protos.status_pb2 import Endpoint
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

TITLE = "colocated server"
TRANSPORT: Final = "local"
_CPU_TILES_PER_TURN: Final = 8
"""What the language side can prefill in its next turn: 2048 tokens. See docs/decisions.md for other sizes measured."""
_NO_LIMIT: Final = 1e6
_STRETCHES: Final = ("max_prefill_stretch", "max_text_prefill_stretch")
_NOT_OURS: Final = {"announce": None, "metrics_listen": None}
"""One announcement and one page of metrics for both sides."""
_DELIVERED: Final = frozenset({"ok", "duplicate"})


class DeviceTurn(AbstractContextManager[None]):
    """A lock that is granted in the order in which it was asked for, so that two who always want it alternate.

    ``threading.Lock`` would go back to the thread that has just released it. Without a deadline: a thread that does not
    end its turn is one that ``close`` of its server reports as stuck.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the two numbers
        self._num_asked = 0
        self._num_ended = 0

    @property
    def num_waiting(self) -> int:
        """Threads in line behind the one whose turn it is."""
        with self._changed:
            return max(0, self._num_asked - self._num_ended - 1)

    def __enter__(self) -> None:
        with self._changed:
            own = self._num_asked
            self._num_asked += 1
            self._changed.wait_for(lambda: self._num_ended == own)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._num_ended += 1
            self._changed.notify_all()


class LocalTransport:
    """Both ends of the feature plane in one process: the same checks, one copy, no socket.

    The address tells processes apart: with two of them behind one router, a frame that is meant for the other one is
    not taken.
    """

    def __init__(self) -> None:
        self._endpoint = Endpoint(transport=TRANSPORT, address=secrets.token_hex(8))
        self._sink: FrameSink | None = None
        self._sent = SendMeter(TRANSPORT)
        self._received = ReceiveMeter(TRANSPORT)

    async def start(self, sink: FrameSink) -> Endpoint:
        """See ``common.transport.base.FeatureReceiver``."""
        self._sink = sink
        return self._endpoint

    async def close(self) -> None:
        self._sink = None

    async def send(self, endpoints: Sequence[Endpoint], packed_header: bytes, payload: Buffer, timeout: float) -> str:
        """Hand one frame to the sink.

        Raises:
            FrameRejected: the sink refused the frame.
            TransportFailed: it is for another process, or this one is closing.
        """
        num_bytes = memoryview(payload).nbytes
        with self._sent.sending(num_bytes):
            if self._sink is None or self._endpoint not in endpoints:
                raise TransportFailed("the features are for another server")
            verdict = receive_frame(self._sink, packed_header, payload)
            self._received.received(verdict, num_bytes)
            if verdict not in _DELIVERED:
                raise FrameRejected(verdict, "refused by the receiver")
        return TRANSPORT


class ColocatedServer:
    """A vision and a language server as one ``common.service.program.Worker``.

    Construction reads headers only, and raises StartupError on what cannot work.
    """

    def __init__(self, settings: ColocatedSettings) -> None:
        turn, features = DeviceTurn(), LocalTransport()
        self._settings = settings
        # What can fail comes first: a gRPC server that was made and is not closed complains when the process ends.
        _check_memory(settings)
        listen = settings.metrics_listen
        self._metrics_address = metrics.start_server(listen, "colocated") if listen else ""
        self.language = LanguageServer(_tuned_language(settings.language), receivers=[features], turn=turn)
        self.vision = VisionServer(_tuned_vision(settings.vision), courier=features, turn=turn)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the thread of either side is."""

    async def start(self) -> None:
        """Listen on both addresses. Raises ConfigError if one cannot be had."""
        await self.vision.start()
        await self.language.start()

    async def load(self, progress: Progress = lambda done, total: None) -> None:
        """Vision first: what KV memory takes of a GPU is a share of what is left beside both sides' weights."""
        await self.vision.load(progress)
        metrics.set_state("starting")  # one side is ready, the process is not
        await self.language.load(progress)
        for side in (self.vision.ended, self.language.ended):
            side.add_done_callback(self._on_side_ended)
        announce.write(
            self._settings.announce,
            name=self._settings.name,
            role="colocated",
            address=self.language.address,
            metrics_address=self._metrics_address,
        )

    def abort_load(self) -> None:
        """Make ``load`` fail at the next tensor."""
        self.vision.abort_load()
        self.language.abort_load()

    async def drain(self) -> None:
        """Language first: what it admitted may still need its images encoded."""
        await self.language.drain()
        await self.vision.drain()

    async def close(self) -> bool:
        """Let go of everything. False if one of the two threads does not end."""
        return all(await asyncio.gather(self.language.close(), self.vision.close()))

    @property
    def ready_line(self) -> str:
        """What the operator reads."""
        return f"{self.vision.ready_line}; {self.language.ready_line}"

    def _on_side_ended(self, side: asyncio.Future[None]) -> None:
        error = side.exception()
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both servers until SIGTERM or SIGINT; returns the exit status."""
    return run_program(TITLE, ColocatedSettings, argv, run)


async def run(settings: ColocatedSettings) -> int:
    """0 after a drain, 1 when the device thread or the engine died."""
    if settings.language.threads is not None:
        torch.set_num_threads(settings.language.threads)
    return await run_worker(TITLE, lambda: ColocatedServer(settings))


def _check_memory(settings: ColocatedSettings) -> None:
    """Both sides' weights together; more is checked by each side for itself. Raises StartupError."""
    sides: dict[Role, VisionSettings | LanguageSettings] = {"vision": settings.vision, "language": settings.language}
    needs = {}
    for role, side in sides.items():
        checkpoint, device = Checkpoint.open(side.model), choose_device(side.device)
        dtype = choose_dtype(side.dtype, device)
        quantization = NOT_QUANTIZED
        if isinstance(side, LanguageSettings):
            config = load_config(side.model)
            quantization = choose_quantization(side.quantization, checkpoint, config, dtype=dtype, device=device)
        needs[f"{role} weights"] = memory.weight_bytes(checkpoint, role, dtype, quantization.num_bytes)
    memory.check_fits(TITLE, needs, choose_device(settings.language.device))


def _tuned_vision(settings: VisionSettings) -> VisionSettings:
    """On a CPU a batch of one tile is best, a turn of one tile is not: nearly every step would wait for a tile."""
    is_cpu = choose_device(settings.device).type == "cpu"
    tiles = settings.max_batch_tiles or (_CPU_TILES_PER_TURN if is_cpu else None)
    return settings.model_copy(update={**_NOT_OURS, "max_batch_tiles": tiles})


def _tuned_language(settings: LanguageSettings) -> LanguageSettings:
    """Small steps keep tokens even, but not where each one waits for a batch of tiles: take what is there at once."""
    stretches = {name: _NO_LIMIT for name in _STRETCHES if name not in settings.model_fields_set}
    return settings.model_copy(update={**_NOT_OURS, **stretches})


if __name__ == "__main__":
    sys.exit(main())
