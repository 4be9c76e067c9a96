"""What the router costs: the real program on one core, beside an application that does nothing on the same server.

    python -m benchmarks router

All subjects are pinned to one core and take turns in every round; the load and a language server that does nothing have
the others. Between the two is a relay, the bare application with one gRPC call for each request and an event for each
token that comes: what it costs, no router in this language can save. A closed loop says how many requests a second each
of them carries, a low fixed rate how much later a first token comes through the router. Ratios and differences are
taken within a round; their medians are shown. A core of the load that is as busy as the router's is a bound on what was
measured: both are shown.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import msgspec
import numpy as np
import uvloop
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.http_load import Answer, closed_loop, fixed_rate
from benchmarks.overhead import cpu_seconds, pinned
from benchmarks.record import write_record
from common.service.errors import Unavailable
from common.service.settings import ENV_PREFIX

Subject = Literal["bare app", "bare relay", "router"]
SUBJECTS: Final[tuple[Subject, ...]] = ("bare app", "bare relay", "router")
MIN_OF_BARE_APP: Final = 0.6
"""Mark: requests/s."""
MAX_ADDED_P50_MS: Final = 2.0
"""Mark: time to first token."""
_STOP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """``seconds`` for each of the two measurements, of each subject, in each round."""

    rounds: int = 5
    seconds: float = 3.0
    num_at_once: int = 8
    per_second: float = 20.0


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request."""

    name: str
    body: bytes
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What one subject did in one round. ``core_busy``, ``load_busy``: CPU seconds per second in the closed loop, of
    the subject, and of the client and the language server together, which share what cores are left."""

    subject: Subject
    requests_per_s: float
    core_busy: float
    load_busy: float
    first_token_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request through the router, beside the bare application. ``turns``: rounds in order."""

    body: str
    num_tokens: int
    requests_per_s: float
    bare_requests_per_s: float
    of_bare_app: float
    of_bare_relay: float
    added_p50_ms: float
    added_p99_ms: float
    core_busy: float
    load_busy: float
    turns: list[dict[str, Any]]

    @property
    def is_held(self) -> bool:
        return self.of_bare_app >= MIN_OF_BARE_APP and self.added_p50_ms <= MAX_ADDED_P50_MS


@dataclass(frozen=True, slots=True)
class Program:
    """One that runs."""

    url: str
    pid: int


def text_load(num_bytes: int, num_tokens: int) -> Load:
    """A body of ``num_bytes`` with nothing but text."""
    text = "a" * (num_bytes - len(_body("", num_tokens)))
    return Load(f"text, {_size(num_bytes)}", _body(text, num_tokens), num_tokens)


def image_load(num_bytes: int, num_tokens: int) -> Load:
    """A body of about ``num_bytes``: one picture that cannot be compressed, as a data URL."""
    side = max(1, math.isqrt(num_bytes // 4))  # three bytes a pixel, which base64 makes four
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Look."}]
    body = _body(content, num_tokens)
    return Load(f"image, {_size(num_bytes)}", body, num_tokens)


def _body(content: Any, num_tokens: int) -> bytes:
    return msgspec.json.encode(
        {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": num_tokens}
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 10**5 else f"{num_bytes / 1e3:.3g} KB"


def measure(loads: Sequence[Load], options: Options) -> list[Case]:
    """Raises Unavailable when a program does not start, or an answer is not what was asked for."""
    cores = sorted(os.sched_getaffinity(0))
    own, others = cores[-1:], cores[:-1] or cores
    with contextlib.ExitStack() as stack:
        with pinned(*others):
            workers = stack.enter_context(_program("benchmarks.mock_workers"))
        with pinned(*own):
            address = workers.url
            router = _program("router", "--port", "0", "--vision", address, "--language", address)
            programs: dict[Subject, Program] = {
                "bare app": stack.enter_context(_program("benchmarks.bare_app")),
                "bare relay": stack.enter_context(_program("benchmarks.bare_app", "--language", address)),
                "router": stack.enter_context(router),
            }
        stack.enter_context(pinned(*others))
        return [_measure_load(load, programs, workers, options) for load in loads]


def _measure_load(load: Load, programs: dict[Subject, Program], workers: Program, options: Options) -> Case:
    for subject in SUBJECTS:
        _check_answer(subject, load, _run(fixed_rate(_url(programs[subject], load), load.body, 1.0, 1.0))[0])
    rounds = []
    for index in range(options.rounds):
        order = SUBJECTS if index % 2 == 0 else SUBJECTS[::-1]
        rounds.append({each: _take_turn(each, load, programs[each], workers, options) for each in order})
    return make_case(load, rounds)


def make_case(load: Load, rounds: Sequence[Mapping[Subject, Turn]]) -> Case:
    """Medians over rounds."""
    routers = [turns["router"] for turns in rounds]

    def share_of(subject: Subject) -> float:
        return median(turns["router"].requests_per_s / turns[subject].requests_per_s for turns in rounds)

    def added(percentile: str) -> float:
        return median(
            turns["router"].first_token_ms[percentile] - turns["bare app"].first_token_ms[percentile]
            for turns in rounds
        )

    return Case(
        body=load.name,
        num_tokens=load.num_tokens,
        requests_per_s=median(router.requests_per_s for router in routers),
        bare_requests_per_s=median(turns["bare app"].requests_per_s for turns in rounds),
        of_bare_app=share_of("bare app"),
        of_bare_relay=share_of("bare relay"),
        added_p50_ms=added("p50"),
        added_p99_ms=added("p99"),
        core_busy=median(router.core_busy for router in routers),
        load_busy=median(router.load_busy for router in routers),
        turns=[asdict(turn) for turns in rounds for turn in turns.values()],
    )


def _take_turn(subject: Subject, load: Load, program: Program, workers: Program, options: Options) -> Turn:
    url = _url(program, load)
    began_at, before = time.perf_counter(), (cpu_seconds(program.pid), _load_seconds(workers))
    requests_per_s = _run(closed_loop(url, load.body, options.num_at_once, options.seconds))
    seconds = time.perf_counter() - began_at
    after = cpu_seconds(program.pid), _load_seconds(workers)
    answers = _run(fixed_rate(url, load.body, options.per_second, options.seconds))
    first_ms = [1e3 * answer.first_token for answer in answers]
    return Turn(
        subject=subject,
        requests_per_s=requests_per_s,
        core_busy=(after[0] - before[0]) / seconds,
        load_busy=(after[1] - before[1]) / seconds,
        first_token_ms={f"p{p}": float(np.percentile(first_ms, p)) for p in (50, 99)},
    )


def _load_seconds(workers: Program) -> float:
    """CPU of this process and of the language server so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + cpu_seconds(workers.pid)


def _check_answer(subject: Subject, load: Load, answer: Answer) -> None:
    """A role with the first token, the others, the end, and the end of the stream."""
    num_events = answer.data.count(b"data: ")
    if num_events != load.num_tokens + 3:
        raise Unavailable(f"the {subject} sent {num_events} events for {load.num_tokens} tokens")


def _url(program: Program, load: Load) -> str:
    return f"{program.url}/v1/chat/completions?{load.num_tokens}"


def _run(what: Any) -> Any:
    """On the loop of our servers, whose client costs less than asyncio's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(what)


@contextlib.contextmanager
def _program(module: str, *arguments: str) -> Iterator[Program]:
    """Raises Unavailable unless it says where it listens."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a log line for each request, as in earnest, for nobody
        env=environ,
        text=True,
    )
    try:
        assert process.stdout is not None  # asked for
        words = process.stdout.readline().removeprefix("ready at ").split()
        if not words:
            raise Unavailable(f"{module} did not start")
        yield Program(words[0], process.pid)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def print_cases(cases: Sequence[Case]) -> None:
    table = Table(
        "body", "tokens", "requests/s", "bare app", "ratio", "of relay", "added p50, ms", "p99", "core", "load", "held"
    )
    for case in cases:
        table.add_row(
            case.body,
            str(case.num_tokens),
            f"{case.requests_per_s:.0f}",
            f"{case.bare_requests_per_s:.0f}",
            f"{case.of_bare_app:.2f}",
            f"{case.of_bare_relay:.2f}",
            f"{case.added_p50_ms:.2f}",
            f"{case.added_p99_ms:.2f}",
            f"{100 * case.core_busy:.0f} %",
            f"{100 * case.load_busy:.0f} %",
            "yes" if case.is_held else "no",
        )
    Console(width=120).print(table)


def main(argv: Sequence[str]) -> int:
    usual = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks router", description=__doc__)
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of each measurement in each round")
    parser.add_argument("--concurrency", type=int, default=usual.num_at_once, help="of the closed loop")
    parser.add_argument("--request-rate", type=float, default=usual.per_second, help="at which first tokens are timed")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64])
    parser.add_argument("--text-bytes", type=int, default=1000, help="of a body without pictures")
    parser.add_argument("--image-bytes", type=int, default=2 * 10**6, help="of a body with one")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    loads = [text_load(arguments.text_bytes, num_tokens) for num_tokens in arguments.tokens]
    loads += [image_load(arguments.image_bytes, num_tokens) for num_tokens in arguments.tokens]
    options = Options(arguments.rounds, arguments.seconds, arguments.concurrency, arguments.request_rate)
    cases = measure(loads, options)
    print_cases(cases)
    if arguments.results:
        print(write_record(arguments.results, "router", argv, [asdict(case) for case in cases]))
    return 0 if all(case.is_held for case in cases) else 1
