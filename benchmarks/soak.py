"""Ten thousand requests as nobody would plan them: every one must end, and nothing may be left behind.

    python -m benchmarks soak --requests 10000 --results benchmarks/results

Hypothesis draws what is asked, sixteen requests at a time: text and pictures, every sampling option, clients that leave
in the middle, and requests that must be refused. KV memory is so small that sequences are preempted. In between, all
gauges of held work must come back to zero; at the end, memory must be where it was after the first quarter.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.cancel import held, seconds_until
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.tables import Table, number
from benchmarks.workload import Size, chat_body, noise_picture
from common.service.errors import InternalError
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings

BATCH: Final = 16
_TIMEOUT: Final = 120.0
_CHECK_EVERY: Final = 512
_MAX_GROWTH_MIB: Final = 48.0
"""Of one program, from the first quarter to the end: allocators wander by some tens of MiB, a leak of a KiB a request
would be 7."""
_KV_BYTES: Final = 6 << 20
_ENDS: Final = frozenset({"stop", "length"})


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and how it must end: ``status`` of the reply; None: the client leaves after so many events."""

    body: dict[str, Any]
    status: int | None
    num_events: int = 0


@dataclass(slots=True)
class Report:
    ends: Counter[str] = field(default_factory=Counter)
    memory: list[dict[str, float]] = field(default_factory=list)
    """MiB of each program, over time."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> dict[str, float]:
        """MiB of each program since the first quarter."""
        first, last = self.memory[len(self.memory) // 4], self.memory[-1]
        return {name: last[name] - first[name] for name in last}

    @property
    def figures(self) -> dict[str, Any]:
        """For a record."""
        return {
            "ends": dict(self.ends),
            "memory_mib": self.memory,
            "growth_mib": self.growth,
            "failures": self.failures,
            "seconds": self.seconds,
        }


SAMPLING: Final = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 24)},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.floats(0.05, 1.0),
        "top_k": st.integers(-1, 50),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "seed": st.integers(0, 2**63 - 1),
        "n": st.integers(1, 3),
        "stop": st.sampled_from(["a", ["e", "number"], ["\n"]]),
        "logit_bias": st.dictionaries(st.integers(0, 50).map(str), st.floats(-100, 100), max_size=4),
        "ignore_eos": st.booleans(),
        "logprobs": st.just(True),
        "min_tokens": st.just(1),
    },
)
TEXTS: Final = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=80)
PICTURES: Final = st.lists(
    st.tuples(st.sampled_from([(40, 30), (448, 448), (900, 448)]), st.integers(0, 7)), max_size=2
)
REFUSED: Final[st.SearchStrategy[dict[str, Any]]] = st.sampled_from(
    [
        {"n": 0},
        {"n": 10_000},
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"logit_bias": {"99999999": 1}},
        {"stop_token_ids": [99999999]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "long " * 40_000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,no"}}]}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        {"structured_outputs": {"regex": "("}},
    ]
)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    """Any request."""
    images = [_picture(*picture) for picture in draw(PICTURES)]
    body: dict[str, Any] = chat_body(draw(TEXTS), images, max_dynamic_patch=2, **draw(SAMPLING))
    kind = draw(st.sampled_from(["answered", "answered", "answered", "left", "refused"]))
    if kind == "refused":
        wrong: dict[str, Any] = draw(REFUSED)
        return Ask(body | wrong, 400)
    if kind == "left":
        return Ask(body | {"stream": True}, None, draw(st.integers(0, 6)))
    return Ask(body, 200)


def soak(deployment: LocalDeployment, num_requests: int) -> Report:
    """Ask, look, and report. ``report.failures`` says what went wrong."""
    report = Report()
    num_batches = -(-num_requests // BATCH)
    checks = max(1, min(_CHECK_EVERY, num_requests // 8) // BATCH)

    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(asks(), min_size=BATCH, max_size=BATCH))
    def run(batch: list[Ask]) -> None:
        asyncio.run(_ask_all(deployment, batch, report))
        if sum(report.ends.values()) // BATCH % checks == 0:
            _look(deployment, report)

    started = time.monotonic()
    # Hypothesis stops early when it believes to have seen everything; ask again until the number is reached.
    while sum(report.ends.values()) < num_requests:
        run()
    _look(deployment, report)
    report.seconds = time.monotonic() - started
    return report


def judge_memory(report: Report) -> None:
    """Of a run of thousands: in the first hundreds every program still warms up."""
    grown = {name: mib for name, mib in report.growth.items() if mib > _MAX_GROWTH_MIB}
    report.failures += [f"{name} grew by {mib:.0f} MiB" for name, mib in grown.items()]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--model", default="nano", help="a checkpoint directory, or nano")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    with LocalDeployment(serve_settings(arguments.model)) as deployment:
        report = soak(deployment, arguments.requests)
    judge_memory(report)
    print_table(Console(width=120), shown(report))
    for failure in report.failures[:20]:
        print(failure)
    if arguments.results:
        print(write_record(arguments.results, "soak", argv, report.figures))
    return 1 if report.failures else 0


def serve_settings(model: str) -> ServeSettings:
    """A deployment in which sequences compete for blocks."""
    options = {"model": model, "port": 0, "kv_cache_bytes": _KV_BYTES, "max_model_len": 2048, "max_num_seqs": 12}
    return ServeSettings.model_validate(options)


def shown(report: Report) -> Table:
    """How the requests ended, and what each program's memory did."""
    rows = [[name, str(count)] for name, count in sorted(report.ends.items())]
    rows += [
        [f"{name}: MiB after a quarter, at the end", f"{number(last - grown)} -> {number(last)}"]
        for (name, last), grown in zip(report.memory[-1].items(), report.growth.values(), strict=True)
    ]
    rows += [["seconds", number(report.seconds)], ["failures", str(len(report.failures))]]
    return Table("Soak", ["", "requests"], rows)


async def _ask_all(deployment: LocalDeployment, batch: Sequence[Ask], report: Report) -> None:
    async with httpx.AsyncClient(base_url=deployment.address, timeout=_TIMEOUT, trust_env=False) as client:
        for end in await asyncio.gather(*(_ask(client, ask) for ask in batch), return_exceptions=True):
            if isinstance(end, BaseException):
                report.failures.append(f"{type(end).__name__}: {end}")
            report.ends["failed" if isinstance(end, BaseException) else end] += 1


async def _ask(client: httpx.AsyncClient, ask: Ask) -> str:
    """One word for how it ended. Raises InternalError for an end that it must not have."""
    if ask.status is None:
        return await _leave(client, ask)
    reply = await client.post("/v1/chat/completions", json=ask.body)
    if reply.status_code != ask.status:
        raise _unexpected(reply, ask)
    if ask.status != 200:
        return "refused"
    ends = {choice["finish_reason"] for choice in reply.json()["choices"]}
    if not ends <= _ENDS or len(reply.json()["choices"]) != ask.body.get("n", 1):
        raise _unexpected(reply, ask)
    return "answered"


async def _leave(client: httpx.AsyncClient, ask: Ask) -> str:
    async with client.stream("POST", "/v1/chat/completions", json=ask.body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            raise _unexpected(reply, ask)
        num_events = 0
        async for line in reply.aiter_lines():
            num_events += line.startswith("data:")
            if num_events >= ask.num_events:
                return "left"
    return "left at the end"


def _unexpected(reply: httpx.Response, ask: Ask) -> InternalError:
    options = {name: value for name, value in ask.body.items() if name != "messages"}
    return InternalError(f"status {reply.status_code} for {options}: {reply.text[:300]}")


def _look(deployment: LocalDeployment, report: Report) -> None:
    """Nothing is held once nobody asks; note each program's memory."""
    try:
        asyncio.run(seconds_until(deployment, None))
    except TimeoutError:
        report.failures.append(f"still held: {', '.join(sorted(held(deployment)))}")
    report.memory.append({process.name: _resident_mib(process.pid) for process in deployment.processes})


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@lru_cache(maxsize=64)
def _picture(size: tuple[int, int], seed: int) -> Any:
    return noise_picture(Size(*size), np.random.default_rng(seed))
