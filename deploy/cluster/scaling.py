"""How many servers each group shall have: the operator's word, and what the load asks for. Starts and ends nothing."""

import logging
from collections.abc import Mapping

from common.service import metrics
from common.service.errors import InvalidRequest
from deploy.cluster.autoscaler import Autoscaler, Rules, language_demand, vision_demand
from deploy.cluster.ledger import Ledger
from deploy.cluster.listener import Listener
from deploy.cluster.spec import ClusterSpec
from deploy.cluster.tiers import TIERS, Tier

log = logging.getLogger(__name__)


class Scaling:
    """Writes into the ledger what is desired; times are in seconds and come from the caller."""

    def __init__(self, spec: ClusterSpec, listener: Listener, now: float) -> None:
        self._spec = spec
        self._listener = listener
        self._scalers = {tier: Autoscaler(_rules(spec, tier), now) for tier in TIERS if spec.is_scaled(tier)}

    def order(self, ledger: Ledger, sizes: Mapping[Tier, int], now: float) -> None:
        """The operator's word. Raises InvalidRequest naming what is allowed; then nothing is changed."""
        for tier, size in sizes.items():
            least, most = self._spec.bounds(tier)
            if size < least or (most is not None and size > most):
                allowed = f"at least {least}" if most is None else f"{least} to {most}"
                raise InvalidRequest(f"{tier}={size}: this cluster may have {allowed}")
        for tier, size in sizes.items():
            _desire(ledger, tier, size)
            if tier in self._scalers:
                self._scalers[tier].note_change(now)

    def follow_load(self, ledger: Ledger, now: float) -> None:
        """Grow and shrink the groups that may."""
        for tier, scaler in self._scalers.items():
            size, num_ready = ledger.desired[tier], len(ledger.ready(tier))
            _desire(ledger, tier, scaler.observe(now, size, num_ready, self._demand(tier)))

    def overview(self, ledger: Ledger) -> dict[Tier, dict[str, int | bool | None]]:
        """For ``dvd status``."""
        found: dict[Tier, dict[str, int | bool | None]] = {}
        for tier in TIERS:
            least, most = self._spec.bounds(tier)
            is_scaled = tier in self._scalers
            found[tier] = {"desired": ledger.desired[tier], "min": least, "max": most, "is_scaled": is_scaled}
        return found

    def _demand(self, tier: Tier) -> float | None:
        rules = self._spec.autoscale
        if tier == "vision":
            return vision_demand(self._listener.vision_loads, rules.vision_drain_seconds)
        return language_demand(self._listener.language_loads, rules.language_kv_usage, rules.language_waiting)


def export(ledger: Ledger) -> None:
    """The gauges of what is desired."""
    for tier in TIERS:
        metrics.CLUSTER_SERVERS_DESIRED.labels(tier).set(ledger.desired[tier])


def _desire(ledger: Ledger, tier: Tier, size: int) -> None:
    before = ledger.desired[tier]
    if size != before:
        log.info("%s: %d servers instead of %d", tier, size, before)
        metrics.CLUSTER_SCALE_EVENTS.labels(tier, "up" if size > before else "down").inc()
        ledger.desired[tier] = size


def _rules(spec: ClusterSpec, tier: Tier) -> Rules:
    least, most = spec.bounds(tier)
    assert most is not None  # is_scaled
    given = spec.autoscale
    return Rules(
        min_size=least,
        max_size=most,
        hysteresis=given.hysteresis,
        confirmations=given.confirmations,
        cooldown_up=given.cooldown_up,
        cooldown_down=given.cooldown_down,
        max_step_up=given.max_step_up,
    )
