"""A run before it is run: phases one after the other, in each phase sources side by side. Plain data.

    Plan(phases=(Phase("text alone", (Source("text", ClosedLoop(4), Workload(text_only_share=1)),), duration=30),))

``benchmarks.runner.run(plan, target)`` runs it, from any program.
"""

import secrets
from dataclasses import dataclass, field
from typing import Final

from benchmarks.arrivals import Arrivals, Replay
from benchmarks.workload import Workload

SALT_BITS: Final = 62


@dataclass(frozen=True, slots=True)
class Source:
    """Requests of one kind. ``num_requests`` bounds it, a trace bounds itself, and otherwise the phase does."""

    name: str
    arrivals: Arrivals
    workload: Workload
    num_requests: int | None = None

    @property
    def is_bounded(self) -> bool:
        return self.num_requests is not None or isinstance(self.arrivals, Replay)

    @property
    def asks(self) -> str:
        """What it asks, in words."""
        if isinstance(self.arrivals, Replay):
            return f"{self.workload.describe_images()}, lengths as recorded"
        return str(self.workload)


@dataclass(frozen=True, slots=True)
class Phase:
    """Sources that run at once.

    The load starts, and after ``warmup`` seconds the window opens. It closes after ``duration`` seconds, or as soon
    as every bounded source has had its requests answered. Then nothing more is sent, and what is on its way is waited
    for. Where one source stands beside others, it goes on beyond its ``num_requests`` until all of them have theirs.
    """

    name: str
    sources: tuple[Source, ...]
    duration: float | None = None
    warmup: float = 0.0

    def __post_init__(self) -> None:
        names = {source.name for source in self.sources}
        if not self.sources or len(names) < len(self.sources):
            raise ValueError(f"phase {self.name}: sources need different names")
        if self.duration is None and not any(source.is_bounded for source in self.sources):
            raise ValueError(f"phase {self.name}: nothing ends it")

    def label(self, source: Source) -> str:
        """What one of its sources is called where there are others."""
        return self.name if len(self.sources) == 1 else f"{self.name}: {source.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All phases.

    ``salt``: part of what every picture and text is made of, by default another one in every run, so that no cache of
    the server knows them from the run before; sizes and lengths follow from ``seed`` alone. ``compared``: names of the
    phases (text alone, images alone, both) of a comparison, if it is one.
    """

    phases: tuple[Phase, ...]
    seed: int = 0
    salt: int = field(default_factory=lambda: secrets.randbits(SALT_BITS))
    compared: tuple[str, str, str] | None = None

    def describe(self) -> list[str]:
        """One line for each source of each phase: its load, and what it asks."""
        return [
            f"{phase.label(source)}: {source.arrivals}; {source.asks}"
            for phase in self.phases
            for source in phase.sources
        ]


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible server. ``model`` None: the first that it names. ``timeout``: seconds for one request."""

    base_url: str
    model: str | None = None
    api_key: str = ""
    timeout: float = 600.0
