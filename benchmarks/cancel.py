"""How long a client that left goes on costing: until every gauge of held work in ``/metrics`` is back at zero.

python -m benchmarks cancel --model nano
"""

import argparse
import asyncio
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.workload import chat_body, noise_image
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings, model_directory

HELD = {
    "dvd_requests_running",
    "dvd_language_requests_running",
    "dvd_language_requests_waiting",
    "dvd_language_kv_cache_usage_ratio",
    "dvd_language_features_held_bytes",
    "dvd_vision_items_running",
    "dvd_vision_items_waiting",
    "dvd_vision_tiles_waiting",
}
WAIT_SECONDS = 60.0


def held(deployment: LocalDeployment) -> set[str]:
    """Gauges of held work that are not zero, over all three programs."""
    addresses = [deployment.address, *(f"http://{address}" for address in deployment.metrics_addresses.values())]
    found = set()
    for address in addresses:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                found |= {sample.name for sample in family.samples if sample.name in HELD and sample.value > 0}
    return found


async def seconds_until(deployment: LocalDeployment, wanted: str | None) -> float:
    """Wait until ``wanted`` is held, or with None until nothing is."""
    start = time.perf_counter()
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            now_held = await asyncio.to_thread(held, deployment)
            if (wanted in now_held) if wanted else not now_held:
                return time.perf_counter() - start
            await asyncio.sleep(0.01)


async def leave(deployment: LocalDeployment, bodies: Sequence[dict[str, Any]], once_held: str) -> float:
    """Send requests, leave all of them once ``once_held`` is not zero; seconds until nothing is held."""
    async with httpx.AsyncClient(base_url=deployment.address, timeout=WAIT_SECONDS, trust_env=False) as client:
        calls = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for body in bodies]
        await seconds_until(deployment, once_held)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return await seconds_until(deployment, None)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cancel", description=__doc__)
    parser.add_argument("--model", default="nano", help="a checkpoint directory, or nano")
    arguments = parser.parse_args(argv)
    settings = ServeSettings.model_validate({"model": str(model_directory(arguments.model)), "port": 0})
    rng = np.random.default_rng(0)
    decoding = [chat_body("Hello", [], stream=True, ignore_eos=True, max_tokens=4000)]
    queued = [chat_body("Look.", [noise_image(1344, rng)], max_tokens=5) for _ in range(4)]
    with LocalDeployment(settings) as deployment:
        for name, bodies, once_held in (
            ("decoding", decoding, "dvd_language_kv_cache_usage_ratio"),
            ("four 10-tile pictures queued", queued, "dvd_vision_tiles_waiting"),
        ):
            seconds = asyncio.run(leave(deployment, bodies, once_held))
            print(f"{name}: nothing is held {1000 * seconds:.0f} ms after the client left")
