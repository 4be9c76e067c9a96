"""Twice what the system can do, for a minute: it does as much as before, says no at once, and text never notices.

    python -m benchmarks overload --seconds 60 --results benchmarks/results

Requests with a picture, none of which is known, come first in a closed loop: as many clients as serve best find the
peak. Then they come at ``--factor`` times the peak whatever becomes of them. Text-only requests come at a low, steady
rate all the time; what they take at the peak is what they may take beyond it. Client and servers share the cores.
"""

import argparse
import asyncio
import base64
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import numpy as np
from rich.console import Console

from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.tables import Table, number
from benchmarks.workload import jpeg
from common.service.errors import ConfigError
from deploy.local import LocalDeployment
from deploy.nano import data
from deploy.settings import ServeSettings, model_directory

_TIMEOUT: Final = 300.0
_WARM_UP_REQUESTS: Final = 4
_CLIENTS: Final = (4, 8, 16, 32)
"""In the closed loop; the number that serves best is the peak's."""
_MAX_TOKENS: Final = 16
_MIN_GOODPUT: Final = 0.95
_MAX_REJECTION_MS: Final = 10.0
_MAX_TEXT_RATIO: Final = 1.3


@dataclass(slots=True)
class Outcome:
    """How one request went. ``status`` 0: it did not end with a reply."""

    status: int
    sent_at: float
    seconds: float
    retry_after_ms: int | None = None


@dataclass(slots=True)
class Phase:
    """Requests of one phase that lasted ``seconds``; those still open at its end were waited for."""

    seconds: float
    images: list[Outcome] = field(default_factory=list)
    texts: list[Outcome] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Pictures answered for each second of the phase."""
        started = min((outcome.sent_at for outcome in self.images), default=0.0)
        in_time = [each for each in self.images if each.status == 200 and _ended(each) <= started + self.seconds]
        return len(in_time) / self.seconds

    @property
    def rejection_ms(self) -> float:
        """99th percentile of how long a refusal took."""
        return 1e3 * _p99([each.seconds for each in self.images if each.status == 503])

    @property
    def text_ms(self) -> float:
        """99th percentile of a text-only request, from its start to its end."""
        return 1e3 * _p99([each.seconds for each in self.texts])

    def count(self, status: int) -> int:
        return sum(each.status == status for each in self.images)


@dataclass(frozen=True, slots=True)
class Report:
    num_clients: int
    probes: dict[int, float]
    """Goodput by number of clients."""
    peak: Phase
    overload: Phase

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        requests = [*self.peak.images, *self.peak.texts, *self.overload.images, *self.overload.texts]
        refused = [each for each in requests if each.status == 503]
        found = {
            f"goodput is below {_MIN_GOODPUT:.0%} of the peak": self.goodput_ratio < _MIN_GOODPUT,
            f"refusals take more than {_MAX_REJECTION_MS:g} ms": self.overload.rejection_ms > _MAX_REJECTION_MS,
            f"text takes more than {_MAX_TEXT_RATIO:g} times as long": self.text_ratio > _MAX_TEXT_RATIO,
            "a text-only request was not answered": any(e.status != 200 for e in self.overload.texts),
            "a request ended otherwise": any(e.status not in (200, 503) for e in requests),
            "a refusal does not say when to come again": any(e.retry_after_ms is None for e in refused),
        }
        return [what for what, is_so in found.items() if is_so]

    @property
    def goodput_ratio(self) -> float:
        return self.overload.goodput / self.peak.goodput if self.peak.goodput else 0.0

    @property
    def text_ratio(self) -> float:
        return self.overload.text_ms / self.peak.text_ms if self.peak.text_ms else 0.0

    @property
    def figures(self) -> dict[str, Any]:
        """For a record."""
        phases = {"peak": self.peak, "overload": self.overload}
        figures = {name: _figures(phase) for name, phase in phases.items()}
        ratios = {"goodput_ratio": self.goodput_ratio, "text_ratio": self.text_ratio}
        return {"clients": self.num_clients, "probes": self.probes, **figures, **ratios, "failures": self.failures}


class Crowd:
    """Sends requests to one deployment; use it as an async context manager."""

    def __init__(self, address: str) -> None:
        self._address = address
        picture = data.demo("number")
        self._picture, self._question = jpeg(picture.images[0]), picture.question
        self._serial = itertools.count()

    async def __aenter__(self) -> "Crowd":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
        self._session = aiohttp.ClientSession(self._address, connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask_image(self) -> Outcome:
        """With a picture whose bytes nobody has seen: what follows the end of a JPEG means nothing."""
        content = base64.b64encode(self._picture + f"{time.time_ns()}-{next(self._serial)}".encode()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{content}"}}
        return await self._ask([image, {"type": "text", "text": self._question}])

    async def ask_text(self) -> Outcome:
        """Without one."""
        return await self._ask(f"Tell me something. {next(self._serial)}")

    async def _ask(self, content: Any) -> Outcome:
        messages = [{"role": "user", "content": content}]
        body = msgspec.json.encode({"messages": messages, "max_tokens": _MAX_TOKENS, "temperature": 0})
        headers = {"content-type": "application/json"}
        sent_at = time.perf_counter()
        try:
            async with self._session.post("/v1/chat/completions", data=body, headers=headers) as reply:
                await reply.read()
                retry_after = reply.headers.get("retry-after-ms")
                seconds = time.perf_counter() - sent_at
                return Outcome(reply.status, sent_at, seconds, int(retry_after) if retry_after else None)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return Outcome(0, sent_at, time.perf_counter() - sent_at)


async def closed_loop(ask: Callable[[], Awaitable[Outcome]], num_clients: int, seconds: float) -> list[Outcome]:
    """Each client asks as soon as it has been answered."""
    until = time.perf_counter() + seconds
    outcomes: list[Outcome] = []

    async def client() -> None:
        while time.perf_counter() < until:
            outcomes.append(await ask())

    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return outcomes


async def open_loop(
    ask: Callable[[], Awaitable[Outcome]], rate: float, seconds: float, rng: np.random.Generator | None = None
) -> list[Outcome]:
    """Requests come whatever became of those before: by chance, or at even intervals."""
    async with asyncio.TaskGroup() as requests:
        sent = [requests.create_task(_as_outcome(ask)) async for _ in _ticks(rate, seconds, rng)]
    return [request.result() for request in sent]


async def measure(address: str, seconds: float, factor: float, text_rate: float, clients: Sequence[int]) -> Report:
    """Find the peak, stay there, and go beyond."""
    rng = np.random.default_rng(0)
    async with Crowd(address) as crowd:
        for _ in range(_WARM_UP_REQUESTS):
            await crowd.ask_image()
            await crowd.ask_text()
        probes = {}
        for num_clients in clients:
            probe = Phase(max(1.0, seconds / 6))
            probe.images = await closed_loop(crowd.ask_image, num_clients, probe.seconds)
            probes[num_clients] = probe.goodput
        num_clients = max(probes, key=lambda each: probes[each])
        peak, overload = Phase(seconds), Phase(seconds)
        peak.images, peak.texts = await asyncio.gather(
            closed_loop(crowd.ask_image, num_clients, seconds), open_loop(crowd.ask_text, text_rate, seconds)
        )
        if not peak.goodput:
            raise ConfigError(f"no picture was answered within {seconds:g} s")
        overload.images, overload.texts = await asyncio.gather(
            open_loop(crowd.ask_image, factor * peak.goodput, seconds, rng),
            open_loop(crowd.ask_text, text_rate, seconds),
        )
    return Report(num_clients, probes, peak, overload)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overload", description=__doc__)
    parser.add_argument("--model", default="nano", help="a checkpoint directory, or nano")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two long phases")
    parser.add_argument("--factor", type=float, default=2.0, help="of the peak's rate")
    parser.add_argument("--text-rate", type=float, default=2.0, help="text-only requests a second")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    settings = ServeSettings.model_validate({"model": str(model_directory(arguments.model)), "port": 0})
    with LocalDeployment(settings) as deployment:
        report = asyncio.run(
            measure(deployment.address, arguments.seconds, arguments.factor, arguments.text_rate, _CLIENTS)
        )
    print_table(Console(width=120), shown(report))
    for failure in report.failures:
        print(failure)
    if arguments.results:
        print(write_record(arguments.results, "overload", argv, report.figures))
    return 1 if report.failures else 0


def shown(report: Report) -> Table:
    """Both phases side by side."""
    peak, overload = report.peak, report.overload
    rows = [
        ["pictures sent", str(len(peak.images)), str(len(overload.images))],
        ["... answered a second", number(peak.goodput), f"{number(overload.goodput)} ({report.goodput_ratio:.0%})"],
        ["... refused", str(peak.count(503)), str(overload.count(503))],
        ["... refused after, p99 ms", number(peak.rejection_ms), number(overload.rejection_ms)],
        ["text-only p99 ms", number(peak.text_ms), f"{number(overload.text_ms)} ({report.text_ratio:.2f}x)"],
    ]
    return Table(f"Overload ({report.num_clients} clients at the peak)", ["", "peak", "beyond"], rows)


def _figures(phase: Phase) -> dict[str, Any]:
    figures = {name: getattr(phase, name) for name in ("goodput", "rejection_ms", "text_ms", "seconds")}
    for name, outcomes in (("images", phase.images), ("texts", phase.texts)):
        for status in sorted({outcome.status for outcome in outcomes}):
            seconds = [round(outcome.seconds, 4) for outcome in outcomes if outcome.status == status]
            figures[f"{name}_{status}_seconds"] = seconds
    return figures


async def _as_outcome(ask: Callable[[], Awaitable[Outcome]]) -> Outcome:
    return await ask()


_ROUNDING_SECONDS: Final = 1e-6
"""So that the last of even intervals is not lost to the sum of them."""


async def _ticks(rate: float, seconds: float, rng: np.random.Generator | None) -> AsyncIterator[None]:
    """At ``rate`` a second on average; a tick that is late moves none of those after it."""
    started = due = time.perf_counter()
    while True:
        due += 1 / rate if rng is None else rng.exponential(1 / rate)
        if due > started + seconds + _ROUNDING_SECONDS:
            return
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield


def _ended(outcome: Outcome) -> float:
    return outcome.sent_at + outcome.seconds


def _p99(values: Sequence[float]) -> float:
    """Nearest rank; 0 of nothing."""
    return sorted(values)[ceil(0.99 * len(values)) - 1] if values else 0.0
