"""What the client of ``dvd bench serve`` costs itself: many streams from a server that does nothing else, on one core.

    python -m benchmarks overhead --streams 500 --tokens-per-second 20

Client and server are pinned to a core each (where there are two). The server says when it sent each token, so that how
much later the client saw it is known, not guessed. The client holds its streams if none fails and it receives at least
98 % of the tokens that the server is to send.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.arrivals import ClosedLoop
from benchmarks.measures import Distribution, distribution
from benchmarks.plan import Phase, Plan, Source, Target
from benchmarks.record import write_record
from benchmarks.runner import run
from benchmarks.samples import PhaseResult, Result
from benchmarks.workload import Lengths, Workload

_PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
_HELD_SHARE: Final = 0.98
"""Of the offered tokens, received: the client holds."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """One measurement. CPU is in seconds per second; lateness in ms from the server's write to the client's count."""

    streams: int
    offered_tokens_per_s: float
    received_tokens_per_s: float
    client_cpu: float
    server_cpu: float
    client_cpu_us_per_token: float
    failures: int
    lateness: Distribution | None
    server_lateness: Distribution | None
    """How late the server itself was against its pace: part of no figure above, but a busy machine shows here."""

    @property
    def is_held(self) -> bool:
        return self.failures == 0 and self.received_tokens_per_s >= _HELD_SHARE * self.offered_tokens_per_s


def measure(streams: int, tokens_per_second: float, seconds: float, num_tokens: int, warmup: float) -> Overhead:
    """Hold ``streams`` streams for ``seconds``."""
    # Of different lengths, so that the streams do not all end and begin at once.
    lengths = Lengths(max(1, num_tokens // 2), num_tokens * 3 // 2)
    workload = Workload(text_only_share=1.0, output_tokens=lengths)
    phase = Phase("streams", (Source("text", ClosedLoop(streams), workload),), seconds, warmup)
    cores = sorted(os.sched_getaffinity(0))
    with _mock_server(tokens_per_second, cores[-1]) as (address, pid), pinned(cores[0]):
        started, cpu = time.perf_counter(), cpu_seconds(pid)
        result = run(Plan((phase,)), Target(address))
        server_cpu = (cpu_seconds(pid) - cpu) / (time.perf_counter() - started)
    return _overhead(result, streams, tokens_per_second, server_cpu)


def _overhead(result: Result, streams: int, tokens_per_second: float, server_cpu: float) -> Overhead:
    (phase,) = result.phases
    num_received, lateness, server_lateness = _compare(phase, tokens_per_second)
    received = num_received / phase.seconds
    return Overhead(
        streams=streams,
        offered_tokens_per_s=streams * tokens_per_second,
        received_tokens_per_s=received,
        client_cpu=result.client_cpu,
        server_cpu=server_cpu,
        client_cpu_us_per_token=1e6 * result.client_cpu / received if received else 0.0,
        failures=sum(not sample.is_ok for sample in phase.samples),
        lateness=distribution(lateness, _PERCENTILES),
        server_lateness=distribution(server_lateness, _PERCENTILES),
    )


def _compare(phase: PhaseResult, tokens_per_second: float) -> tuple[int, list[float], list[float]]:
    """Tokens received inside the window; ms from sent to received, and from due to sent."""
    num_received = 0
    lateness: list[float] = []
    server_lateness: list[float] = []
    for sample in phase.samples:
        received, sent = np.array(sample.token_times), np.array(sample.metrics.get("sent", []))
        inside = (phase.opened_at <= received) & (received < phase.closed_at)
        num_received += int(inside.sum())
        if len(sent) == len(received) and len(sent):
            lateness += (1e3 * (received - sent)[inside]).tolist()
            due = np.arange(len(sent)) / tokens_per_second
            server_lateness += (1e3 * (sent - due - (sent - due).min())[inside]).tolist()
    return num_received, lateness, server_lateness


@contextlib.contextmanager
def _mock_server(tokens_per_second: float, core: int) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "benchmarks.mock_server", "--tokens-per-second", str(tokens_per_second)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None  # asked for
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def pinned(*cores: int) -> Iterator[None]:
    """This thread, and whatever it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def print_overheads(overheads: Sequence[Overhead]) -> None:
    table = Table("streams", "tokens/s offered", "received", "client CPU", "µs/token", "server CPU", "failed")
    for name in ("late p50, ms", "p99", "p99.9", "server late p99, ms", "held"):
        table.add_column(name)
    for each in overheads:
        late, server = each.lateness, each.server_lateness
        table.add_row(
            str(each.streams),
            f"{each.offered_tokens_per_s:.0f}",
            f"{each.received_tokens_per_s:.0f}",
            f"{100 * each.client_cpu:.0f} %",
            f"{each.client_cpu_us_per_token:.1f}",
            f"{100 * each.server_cpu:.0f} %",
            str(each.failures),
            *("-" if late is None else f"{late[p]:.2f}" for p in (50, 99, 99.9)),
            "-" if server is None else f"{server[99]:.2f}",
            "yes" if each.is_held else "no",
        )
    Console(width=140).print(table)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 100, 500])
    parser.add_argument("--tokens-per-second", type=float, default=20.0, help="of each stream")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, on average")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure, for each number of streams")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds of load before anything is measured")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    overheads = [
        measure(streams, arguments.tokens_per_second, arguments.seconds, arguments.tokens, arguments.warmup)
        for streams in arguments.streams
    ]
    print_overheads(overheads)
    if arguments.results:
        print(write_record(arguments.results, "overhead", argv, [asdict(each) for each in overheads]))
    return 0 if all(each.is_held for each in overheads) else 1
