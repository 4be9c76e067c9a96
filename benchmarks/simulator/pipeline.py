"""The whole system for one run: arrivals -> routers -> vision servers -> the way -> language servers -> tokens.

What it assumes beside its cards:

* Every server of a group is alike; a request or an image goes to the least loaded of a few drawn at random.
* Images of a request go to vision servers as soon as the router has it; feature memory is never the limit.
* A language server has one way in, which takes one message after the other.
* A picture that was seen before is known wherever it is needed (the real router sends equal images to one server).
* What a lost server had is done again elsewhere; features are still in the vision servers' caches.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np

from benchmarks.arrivals import Arrivals, ClosedLoop, OpenLoop, send_times
from benchmarks.simulator.hardware import HardwareCard, LanguageRates, VisionRates
from benchmarks.simulator.jobs import Image, Job, jobs
from benchmarks.simulator.lanes import Busy, Clock, Lane
from benchmarks.simulator.language import Gaps, LanguageServer
from benchmarks.simulator.outcome import Outcome, summarize
from benchmarks.simulator.vision import VisionServer
from benchmarks.workload import Workload
from common.service.errors import ConfigError

_LOOKS: Final = 8
"""Servers that are asked for their load where there are more."""
Group = Literal["vision", "language"]
Server = TypeVar("Server", VisionServer, LanguageServer)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many of which. No vision servers: the undivided baseline, on the devices of the language servers."""

    num_vision: int
    num_language: int
    num_routers: int = 1

    def __post_init__(self) -> None:
        if self.num_vision < 0 or self.num_language < 1 or self.num_routers < 1:
            raise ConfigError(
                f"{self}: expected at least one language server and one router, and no fewer than no vision servers"
            )

    def __str__(self) -> str:
        if not self.num_vision:
            return f"{self.num_language} undivided"
        return f"{self.num_vision} vision : {self.num_language} language"


@dataclass(frozen=True, slots=True)
class Loss:
    """The first server of a group is lost at this time and does not come back."""

    group: Group
    at: float


@dataclass(frozen=True, slots=True)
class Burst:
    """So many requests more, all at once."""

    num_requests: int
    at: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked of the system. The window of the figures is from ``warmup`` to ``warmup + seconds``; then nothing
    more arrives, and everything is answered."""

    workload: Workload
    arrivals: Arrivals
    seconds: float
    warmup: float = 0.0
    vir_share: float = 0.0
    loss: Loss | None = None
    burst: Burst | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Cards:
    """One for each kind of server; the router's figures and the transport's stand on the language servers' card."""

    vision: HardwareCard
    language: HardwareCard
    transport: str = "tcp"


def simulate(layout: Layout, cards: Cards, scenario: Scenario) -> Outcome:
    """Run it. Raises ConfigError where a card lacks something, or a request is too long for any server."""
    return Pipeline(layout, cards, scenario).run()


class Pipeline:
    """One run. ``num_inside`` requests are in the system; ``inside_s`` is its integral over time."""

    def __init__(self, layout: Layout, cards: Cards, scenario: Scenario) -> None:
        self._layout, self._cards, self._scenario = layout, cards, scenario
        self.clock = Clock()
        self._closes = scenario.warmup + scenario.seconds
        self._rates: LanguageRates = cards.language.language_part()
        self._vision_rates: VisionRates = cards.vision.vision_part()
        self._way_rates = cards.language.transport(cards.transport)
        self.busy: dict[str, list[Busy]] = {"router": [], "vision": [], "language": [], "way": []}
        self.gaps: Gaps = []
        self.jobs: list[Job] = []
        self.num_inside = 0
        self.inside_s = 0.0
        self._changed_at = 0.0
        self._rng = np.random.default_rng([scenario.seed, 2])
        self._source: Iterator[Job] = jobs(scenario.workload, scenario.seed, scenario.vir_share)
        self._routers = [Lane(self.clock, self._watch("router")) for _ in range(layout.num_routers)]
        self._next_router = itertools.cycle(self._routers)
        self.vision = [
            VisionServer(self.clock, self._vision_rates, self._watch("vision"), self._send)
            for _ in range(layout.num_vision)
        ]
        tower = None if layout.num_vision else self._vision_rates
        self.language = [
            LanguageServer(self.clock, self._rates, self._watch("language"), self.gaps, self._end, tower)
            for _ in range(layout.num_language)
        ]
        self._ways = {server: Lane(self.clock, self._watch("way")) for server in self.language}
        self._at: dict[Job, LanguageServer] = {}

    def run(self) -> Outcome:
        self.drain()
        return self._summary()

    def drain(self) -> None:
        """Until everything that arrives is answered, which is when the clock stands still."""
        self._schedule_arrivals()
        self._schedule_events()
        self.clock.run()

    def _summary(self) -> Outcome:
        scenario, layout = self._scenario, self._layout
        devices = layout.num_language * self._rates.devices + layout.num_vision * self._vision_rates.devices
        prices = (self._cards.vision.price_per_device_hour, self._cards.language.price_per_device_hour)
        price = None
        if prices[1] is not None and (prices[0] is not None or not layout.num_vision):
            price = layout.num_language * self._rates.devices * prices[1]
            price += layout.num_vision * self._vision_rates.devices * (prices[0] or 0.0)
        return summarize(
            self.jobs, self.gaps, self.busy, scenario.warmup, scenario.seconds, devices, price, self.clock.num_events
        )

    def _watch(self, group: str) -> Busy:
        busy = Busy(self._scenario.warmup, self._closes)
        self.busy[group].append(busy)
        return busy

    # --- what arrives

    def _schedule_arrivals(self) -> None:
        arrivals = self._scenario.arrivals
        if isinstance(arrivals, ClosedLoop):
            for _ in range(arrivals.concurrency):
                self.clock.after(0.0, self._arrive)
            return
        if isinstance(arrivals, OpenLoop) and math.isinf(arrivals.rate):
            raise ConfigError("request rate inf: expected a number of requests/s; a burst is asked for as one")
        times = send_times(arrivals, np.random.default_rng([self._scenario.seed, 3]), self._scenario.warmup)
        self._arrive_at(times)

    def _arrive_at(self, times: Iterator[float]) -> None:
        at = next(times, None)
        if at is None or at >= self._closes:
            return

        def arrive() -> None:
            self._arrive()
            self._arrive_at(times)

        self.clock.after(max(0.0, at - self.clock.now), arrive)

    def _schedule_events(self) -> None:
        burst, loss = self._scenario.burst, self._scenario.loss
        if burst is not None:
            for _ in range(burst.num_requests):
                self.clock.after(burst.at, self._arrive)
        if loss is not None:
            servers: Sequence[object] = self.vision if loss.group == "vision" else self.language
            if len(servers) < 2:
                raise ConfigError(f"losing a {loss.group} server: there is only one; expected two or more")
            self.clock.after(loss.at, self._lose_vision if loss.group == "vision" else self._lose_language)

    def _arrive(self) -> None:
        job = next(self._source)
        self._check(job)
        job.arrived_at = self.clock.now
        self.jobs.append(job)
        self._count(1)
        delay = next(self._next_router).take(self._cards.language.router.s_per_request)
        self.clock.after(delay, lambda: self._route(job))

    def _check(self, job: Job) -> None:
        needed, room = job.prompt_tokens + job.output_tokens, self._rates.kv_tokens
        if needed > room:
            raise ConfigError(
                f"a request of {needed} tokens: the KV memory of a server of card {self._cards.language.name} holds"
                f" {room}; ask for shorter requests or give a server more devices"
            )

    def _count(self, change: int) -> None:
        now = self.clock.now
        self.inside_s += self.num_inside * (now - self._changed_at)
        self.num_inside += change
        self._changed_at = now

    # --- where it goes

    def _route(self, job: Job) -> None:
        server = self._pick(self.language)
        self._at[job] = server
        if self.vision:
            for image in job.images:
                if image.num_there < image.num_tiles:
                    self._encode(job, image)
        server.submit(job)

    def _encode(self, job: Job, image: Image) -> None:
        seconds = self._vision_rates.image_s_per_tile * image.num_tiles
        self.clock.after(seconds, lambda: self._pick(self.vision).submit(job, image, image.num_tiles))

    def _pick(self, servers: Sequence[Server]) -> Server:
        if len(servers) > _LOOKS:
            servers = [servers[index] for index in self._rng.integers(len(servers), size=_LOOKS)]
        return min(servers, key=lambda server: server.load)

    def _send(self, job: Job, image: Image, num_tiles: int) -> None:
        tokens = image.tokens(image.num_sent + num_tiles) - image.tokens(image.num_sent)
        image.num_sent += num_tiles
        self._carry(job, image, num_tiles, tokens)

    def _carry(self, job: Job, image: Image, num_tiles: int, num_tokens: int) -> None:
        server, attempt = self._at[job], job.attempt
        way = self._way_rates.seconds(num_tokens * self._rates.bytes_per_token) - self._way_rates.latency_s

        def arrive() -> None:
            if job.attempt == attempt:
                server.receive(job, image, num_tiles)

        self.clock.after(self._ways[server].take(way) + self._way_rates.latency_s, arrive)

    def _end(self, job: Job) -> None:
        """The last token is there; what the router did for each token delays those that come after."""
        self._count(-1)
        del self._at[job]
        next(self._next_router).take(self._cards.language.router.s_per_token * job.num_answered)
        if isinstance(self._scenario.arrivals, ClosedLoop) and self.clock.now < self._closes:
            self._arrive()

    # --- what is lost

    def _lose_vision(self) -> None:
        for job, image, num_tiles in self.vision.pop(0).lose():
            self._pick(self.vision).submit(job, image, num_tiles)

    def _lose_language(self) -> None:
        for job in self.language.pop(0).lose():
            job.start_again(self.clock.now)
            server = self._at[job] = self._pick(self.language)
            for image in job.images:
                if not self.vision:
                    image.num_sent = 0  # the tower that knew them is gone too
                elif image.num_sent:
                    self._carry(job, image, image.num_sent, image.tokens(image.num_sent))
            server.submit(job)
