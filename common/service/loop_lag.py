"""How late the event loop is: everything that a program answers waits for so long, whatever else it says of itself."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from common.service import metrics

INTERVAL_SECONDS: Final = 0.25


@asynccontextmanager
async def measured_lag() -> AsyncIterator[None]:
    """Four times a second while inside, how much later than it should a timer wakes us."""
    measuring = asyncio.create_task(_measure(), name="event loop lag")
    try:
        yield
    finally:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)


async def _measure() -> None:
    while True:
        due = time.monotonic() + INTERVAL_SECONDS
        await asyncio.sleep(INTERVAL_SECONDS)
        metrics.EVENT_LOOP_LAG_SECONDS.observe(max(0.0, time.monotonic() - due))
