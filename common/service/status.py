"""What a worker tells the routers: one board per process, read by any number of ``WatchStatus`` streams."""

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable

from common.service import metrics
from protos.status_pb2 import (
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    WORKER_STATE_STARTING,
    LanguageLoad,
    ModelInfo,
    VisionLoad,
    WorkerState,
    WorkerStatus,
)

INTERVAL_SECONDS = 1.0
_CPU_TICKS_PER_SECOND = 100
_STATE_NAMES = {
    WORKER_STATE_STARTING: "starting",
    WORKER_STATE_READY: "ready",
    WORKER_STATE_DRAINING: "draining",
}


class StatusBoard:
    """State and load of this process. Everything but ``bump`` belongs to the event loop.

    Args:
        name: configured name of the server, a metric label.
        fingerprint: 16 bytes of the checkpoint, compared by routers.
        load: called for each message; cheap.
        metrics_address: where ``/metrics`` is served, empty when it is not.
    """

    def __init__(
        self,
        name: str,
        fingerprint: bytes,
        model: ModelInfo,
        load: Callable[[], VisionLoad | LanguageLoad],
        metrics_address: str = "",
    ) -> None:
        self._name = name
        self._fingerprint = fingerprint
        self._model = model
        self._load = load
        self._metrics_address = metrics_address
        self._incarnation = secrets.token_bytes(16)
        self._state: WorkerState = WORKER_STATE_STARTING
        self._progress = 0
        self._clock: int | None = None
        self._num_cpu_ticks = 0
        self._changed = asyncio.Event()
        metrics.MODEL_INFO.labels(fingerprint.hex()).set(1)
        metrics.set_state("starting")

    @property
    def state(self) -> WorkerState:
        return self._state

    @state.setter
    def state(self, state: WorkerState) -> None:
        self._state = state
        metrics.set_state(_STATE_NAMES[state])
        # Wakes every stream; the next one waits on a fresh event.
        self._changed.set()
        self._changed = asyncio.Event()

    def bump(self) -> None:
        """Called where the work is done, so that a stuck worker shows although its connection lives. Thread-safe."""
        self._progress += 1

    def count_cpu_time(self, thread: int) -> None:
        """What a thread (``threading.get_ident``) computes counts as progress, too.

        For devices that are the CPU: there one step or layer of a large model may take seconds, and longer where others
        have the cores. A thread that is stuck computes nothing.
        """
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(thread)

    def snapshot(self) -> WorkerStatus:
        """The message a router would get now."""
        status = WorkerStatus(
            name=self._name,
            state=self._state,
            incarnation=self._incarnation,
            fingerprint=self._fingerprint,
            progress=self._progress + self._cpu_ticks(),
            model=self._model,
            metrics_address=self._metrics_address,
        )
        load = self._load()
        if isinstance(load, VisionLoad):
            status.vision.CopyFrom(load)
        else:
            status.language.CopyFrom(load)
        return status

    def _cpu_ticks(self) -> int:
        """Too coarse for a thread that sleeps, and now and then looks whether it may go on."""
        if self._clock is not None:
            with contextlib.suppress(OSError):  # the thread has ended
                self._num_cpu_ticks = int(time.clock_gettime(self._clock) * _CPU_TICKS_PER_SECOND)
        return self._num_cpu_ticks

    async def watch(self) -> AsyncGenerator[WorkerStatus, None]:
        """One message at once, then one a second and one at every change of state."""
        while True:
            changed = self._changed
            yield self.snapshot()
            try:
                await asyncio.wait_for(changed.wait(), INTERVAL_SECONDS)
            except TimeoutError:
                continue
