"""How many servers a group should have. Pure: no clock, no Ray; times are in seconds and come from the caller.

Load is expressed as *demand*: how many servers' worth of work there is. A group grows when the demand exceeds its size
and shrinks when the demand would leave the smaller group spare capacity, so a constant demand has one size.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from protos.status_pb2 import LanguageLoad, VisionLoad


def vision_demand(loads: Sequence[VisionLoad], drain_seconds: float) -> float | None:
    """Servers at work, and those that would encode the queue within ``drain_seconds``. None: nobody reports."""
    if not loads:
        return None
    busy = sum(load.running_tiles > 0 for load in loads)
    queued = sum(load.queued_tiles for load in loads)
    rates = [load.tiles_per_second for load in loads if load.tiles_per_second > 0]
    if queued == 0 or not rates:  # a first queue before anything was encoded says nothing of its length in seconds
        return float(busy)
    return busy + queued / (sum(rates) / len(rates) * drain_seconds)


def language_demand(loads: Sequence[LanguageLoad], kv_usage: float, waiting: float) -> float | None:
    """Servers that hold the KV in use at ``kv_usage``, and one more for each ``waiting`` sequences. None: no report."""
    if not loads:
        return None
    used = sum(1 - load.free_kv_blocks / load.total_kv_blocks for load in loads if load.total_kv_blocks)
    return used / kv_usage + sum(load.num_waiting for load in loads) / waiting


@dataclass(frozen=True, slots=True)
class Rules:
    """How one group may change. Cool-downs are seconds since the last change."""

    min_size: int
    max_size: int
    hysteresis: float
    confirmations: int
    cooldown_up: float
    cooldown_down: float
    max_step_up: int


class Autoscaler:
    """One group's memory of its load.

    Growth needs ``confirmations`` observations in a row, and everything ordered before to have arrived. Shrinking goes
    one server at a time, by the highest demand of the last ``cooldown_down`` seconds.
    """

    def __init__(self, rules: Rules, now: float) -> None:
        self._rules = rules
        self._changed_at = now
        self._num_high = 0
        self._demands: deque[tuple[float, float]] = deque()

    def note_change(self, now: float) -> None:
        """The size was changed, by us or by the operator: cool-downs begin anew."""
        self._changed_at = now
        self._num_high = 0

    def observe(self, now: float, size: int, num_ready: int, demand: float | None) -> int:
        """The size that the group should have now.

        Args:
            size: what it should have had until now.
            num_ready: how many of those serve.
            demand: servers' worth of work; None when unknown, which changes nothing.
        """
        rules = self._rules
        if not rules.min_size <= size <= rules.max_size:
            return self._change(now, min(max(size, rules.min_size), rules.max_size))
        if demand is None:
            self._num_high = 0
            return size
        self._remember(now, demand)
        self._num_high = self._num_high + 1 if demand > size else 0
        if self._may_grow(now, size, num_ready):
            wanted = min(math.ceil(demand), size + rules.max_step_up, rules.max_size)
            return self._change(now, wanted)
        if self._may_shrink(now, size):
            return self._change(now, size - 1)
        return size

    def _remember(self, now: float, demand: float) -> None:
        self._demands.append((now, demand))
        while self._demands[0][0] < now - self._rules.cooldown_down:
            self._demands.popleft()

    def _may_grow(self, now: float, size: int, num_ready: int) -> bool:
        rules = self._rules
        is_confirmed = self._num_high >= rules.confirmations
        return is_confirmed and size < rules.max_size and num_ready >= size and self._has_cooled(now, rules.cooldown_up)

    def _may_shrink(self, now: float, size: int) -> bool:
        rules = self._rules
        is_known = len(self._demands) >= rules.confirmations
        if size <= rules.min_size or not is_known or not self._has_cooled(now, rules.cooldown_down):
            return False
        highest = max(demand for _, demand in self._demands)
        return highest <= (size - 1) * (1 - rules.hysteresis)

    def _has_cooled(self, now: float, seconds: float) -> bool:
        return now - self._changed_at >= seconds

    def _change(self, now: float, size: int) -> int:
        self.note_change(now)
        return size
