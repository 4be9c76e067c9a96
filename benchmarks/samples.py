"""What was seen of each request, and of a run: raw, as the client saw it. Computes nothing that ``measures`` decides.

Times are seconds of ``time.perf_counter``; on Linux that clock is one for all processes of a machine.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.plan import Phase, Plan, Source

FailureKind = Literal["connect", "timeout", "http_status", "error_event", "no_finish_reason", "protocol"]
"""``connect``: no connection, or lost before an answer. ``http_status``: not a 200. ``error_event``: an error after
the 200. ``no_finish_reason``: the stream ended without saying why, or said that it was broken off. ``protocol``: cut,
or not SSE."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request does not count. ``code`` is short and for counting, ``message`` is the server's own."""

    kind: FailureKind
    code: str = ""
    message: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.code}".rstrip()


@dataclass(slots=True)
class Sample:
    """One request.

    ``scheduled_at``: when it was due. ``queue``: how long ``max_concurrency`` held it back after that. ``gaps``:
    between its token events. ``metrics``: the block a server may add (API.md section 4), as it came.
    """

    source: str
    num_images: int
    max_tokens: int
    scheduled_at: float
    queue: float = 0.0
    sent_at: float = 0.0
    first_at: float | None = None
    ended_at: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def is_ok(self) -> bool:
        return self.failure is None

    @property
    def lag(self) -> float:
        """How much later than due it left, through the client's own fault."""
        return max(0.0, self.sent_at - self.scheduled_at - self.queue)

    @property
    def ttft(self) -> float:
        """Sending -> first token event. Only where there was one."""
        assert self.first_at is not None  # a request that succeeded has tokens; asked of no other
        return self.first_at - self.sent_at

    @property
    def e2e(self) -> float:
        """Sending -> the last choice's ``finish_reason``."""
        return self.ended_at - self.sent_at

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def token_times(self) -> list[float]:
        """When its token events came."""
        if self.first_at is None:
            return []
        times = [self.first_at]
        for gap in self.gaps:
            times.append(times[-1] + gap)
        return times


@dataclass(slots=True)
class PhaseResult:
    """One phase. Its window is what rates refer to; the samples are all requests, also those sent before it or ended
    after.

    ``num_unsent``: arrivals that ``max_concurrency`` still held back when the window closed.
    """

    phase: Phase
    opened_at: float
    closed_at: float
    samples: list[Sample]
    num_unsent: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        return self.closed_at - self.opened_at

    def of(self, source: Source) -> list[Sample]:
        return [sample for sample in self.samples if sample.source == source.name]


@dataclass(slots=True)
class Result:
    """A whole run. ``model`` is the name that was asked for; ``client_cpu``: CPU seconds of this process per second."""

    plan: Plan
    base_url: str
    model: str
    started: str
    client_cpu: float
    phases: list[PhaseResult]
