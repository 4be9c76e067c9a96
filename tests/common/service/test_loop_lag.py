"""A loop that stands still shows as lag, and by about how much."""

import asyncio
import time

from common.service import metrics
from common.service.loop_lag import INTERVAL_SECONDS, measured_lag

BLOCKED_SECONDS = 0.2


def lag() -> dict[str, float]:
    (family,) = metrics.EVENT_LOOP_LAG_SECONDS.collect()
    return {sample.name.rpartition("_")[2]: sample.value for sample in family.samples if "le" not in sample.labels}


async def test_a_blocked_loop_is_late():
    before = lag()
    async with measured_lag():
        await asyncio.sleep(0)  # its timer runs
        time.sleep(INTERVAL_SECONDS + BLOCKED_SECONDS)  # noqa: ASYNC251 - that is what it is about
        async with asyncio.timeout(10):
            while lag()["count"] == before["count"]:
                await asyncio.sleep(0.01)
    assert lag()["sum"] - before["sum"] > 0.9 * BLOCKED_SECONDS


async def test_nothing_is_measured_afterwards():
    async with measured_lag():
        pass
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "event loop lag"] == []
