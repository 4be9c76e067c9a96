"""What the servers of a cluster say of themselves, asked directly: it needs neither Ray nor the controller."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from common.service.errors import Unavailable
from common.service.keys import Keys
from deploy.cluster.ledger import Member
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WorkerStatus
from router.workers import LanguageWorker, VisionWorker

_ASK_SECONDS: Final = 3.0


@dataclass(slots=True)
class Row:
    """One server. ``queue`` and ``running`` count tiles (vision), sequences (language) or requests (router).

    ``rate`` is in tiles (vision) or tokens (language) per second. None: it says nothing of it, or does not answer.
    """

    tier: str
    server: str
    replica: str
    state: str
    node: str
    address: str
    pid: int
    directory: str
    queue: int | None = None
    running: int | None = None
    rate: float | None = None
    kv_usage: float | None = None


async def look_at(members: Sequence[Member], keys: Keys | None = None) -> list[Row]:
    """One row for each, in order; those that do not answer in time are ``lost``."""
    return list(await asyncio.gather(*(_look_at(member, keys) for member in members)))


async def _look_at(member: Member, keys: Keys | None) -> Row:
    row = Row(
        tier=member.tier,
        server=member.server,
        replica=member.replica,
        state=member.phase,
        node=member.ip,
        address=member.address,
        pid=member.pid,
        directory=member.directory,
    )
    if not member.address:  # it has not begun to listen
        return row
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            await (_ask_router(row) if member.tier == "router" else _ask_worker(row, keys))
    except (TimeoutError, Unavailable, httpx.HTTPError):
        row.state = "lost"
    return row


async def _ask_worker(row: Row, keys: Keys | None) -> None:
    worker = VisionWorker(row.address, keys) if row.tier == "vision" else LanguageWorker(row.address, keys)
    try:
        statuses = worker.follow_status()
        status = await anext(statuses)
        await statuses.aclose()  # type: ignore[attr-defined]  # it is a generator
    finally:
        await worker.close()
    row.state = "leaving" if row.state == "leaving" else _state(status)
    if row.tier == "vision":
        row.queue, row.running = status.vision.queued_tiles, status.vision.running_tiles
        row.rate = status.vision.tiles_per_second
    else:
        load = status.language
        row.queue, row.running = load.num_waiting, load.num_running
        row.rate = load.tokens_per_second
        row.kv_usage = 1 - load.free_kv_blocks / load.total_kv_blocks if load.total_kv_blocks else None


async def _ask_router(row: Row) -> None:
    url = row.address if "://" in row.address else f"http://{row.address}"
    # Nothing is told there, and only numbers are read; its certificate names what clients dial, not its node.
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
        health, metrics = await asyncio.gather(client.get("/health"), client.get("/metrics"))
    row.state = "leaving" if row.state == "leaving" else ("ready" if health.is_success else "not ready")
    samples = {"dvd_requests_running": 0.0, "dvd_requests_waiting": 0.0}
    for family in text_string_to_metric_families(metrics.text):
        for sample in family.samples:
            if sample.name in samples:
                samples[sample.name] += sample.value
    row.running, row.queue = int(samples["dvd_requests_running"]), int(samples["dvd_requests_waiting"])


def _state(status: WorkerStatus) -> str:
    names = {WORKER_STATE_READY: "ready", WORKER_STATE_DRAINING: "draining"}
    return names.get(status.state, "starting")
