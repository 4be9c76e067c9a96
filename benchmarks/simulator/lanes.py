"""The clock of a simulation, and what serves one thing after the other. SimPy keeps the events."""

from collections.abc import Callable

import simpy


class Clock:
    """Simulated seconds. ``num_events``: how many have happened or will, which is what a simulation costs."""

    def __init__(self) -> None:
        self._environment = simpy.Environment()
        self.num_events = 0

    @property
    def now(self) -> float:
        return float(self._environment.now)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call in this many seconds; in the order asked for where times are equal."""
        self.num_events += 1
        event = self._environment.timeout(seconds)
        event.callbacks.append(lambda _: call())

    def run(self) -> None:
        """Until nothing is left to happen."""
        self._environment.run()


class Busy:
    """Seconds something worked, of those between ``opens`` and ``closes``."""

    def __init__(self, opens: float, closes: float) -> None:
        self._opens, self._closes = opens, closes
        self.seconds = 0.0

    def add(self, begins: float, ends: float) -> None:
        self.seconds += max(0.0, min(ends, self._closes) - max(begins, self._opens))


class Lane:
    """First come, first served, one at a time: a router's core, or the way into a language server.

    When it is free again is known as soon as something is put into it: it needs no events.
    """

    def __init__(self, clock: Clock, busy: Busy) -> None:
        self._clock, self._busy = clock, busy
        self._free_at = 0.0

    def take(self, seconds: float) -> float:
        """Seconds from now until something that takes so long is through."""
        begins = max(self._clock.now, self._free_at)
        self._free_at = begins + seconds
        self._busy.add(begins, self._free_at)
        return self._free_at - self._clock.now
