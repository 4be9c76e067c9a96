"""One vision server: takes tiles of whatever images wait, in order, as many as a batch holds; never waits for more.

What an image has of a batch leaves as soon as the batch is done.
"""

from collections import deque
from collections.abc import Callable

from benchmarks.simulator.hardware import VisionRates
from benchmarks.simulator.jobs import Image, Job
from benchmarks.simulator.lanes import Busy, Clock

Deliver = Callable[[Job, Image, int], None]
"""Called with the tiles of an image that are encoded."""


class VisionServer:
    """``load``: tiles that wait or are being encoded."""

    def __init__(self, clock: Clock, rates: VisionRates, busy: Busy, deliver: Deliver) -> None:
        self._clock, self._rates, self._busy, self._deliver = clock, rates, busy, deliver
        self._waiting: deque[tuple[Job, Image, int]] = deque()
        self._batch: list[tuple[Job, Image, int]] = []
        self.load = 0
        self.is_lost = False

    def submit(self, job: Job, image: Image, num_tiles: int) -> None:
        self._waiting.append((job, image, num_tiles))
        self.load += num_tiles
        if not self._batch:
            self._start()

    def lose(self) -> list[tuple[Job, Image, int]]:
        """It is gone; returns what somebody else has to encode."""
        self.is_lost = True
        left = [*self._batch, *self._waiting]
        self._batch, self._waiting, self.load = [], deque(), 0
        return left

    def _start(self) -> None:
        room = self._rates.max_batch
        while room and self._waiting:
            job, image, num_tiles = self._waiting.popleft()
            taken = min(room, num_tiles)
            self._batch.append((job, image, taken))
            room -= taken
            if taken < num_tiles:
                self._waiting.appendleft((job, image, num_tiles - taken))
        seconds = self._rates.batch_seconds(self._rates.max_batch - room)
        self._busy.add(self._clock.now, self._clock.now + seconds)
        self._clock.after(seconds, self._finish)

    def _finish(self) -> None:
        if self.is_lost:
            return
        done, self._batch = self._batch, []
        self.load -= sum(num_tiles for _, _, num_tiles in done)
        if self._waiting:
            self._start()
        for job, image, num_tiles in done:
            self._deliver(job, image, num_tiles)
