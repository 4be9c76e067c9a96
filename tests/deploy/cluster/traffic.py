"""Clients that ask again and again, with a new picture each time, and count what they get."""

import base64
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence

import httpx
import numpy as np

from deploy.nano import data

TIMEOUT = 60.0


class Traffic:
    """Closed loops in threads of this process: each client has one request open at a time.

    Args:
        urls: of the routers, which the clients take in turn, as a load balancer does that knows nothing of them.
        pause: seconds that a client thinks after an answer; without it, servers have to start beside full load.
    """

    def __init__(self, urls: Sequence[str], num_clients: int = 2, pause: float = 0.05) -> None:
        self._urls = itertools.cycle(urls)
        self._seeds = itertools.count(20_000_000)
        self._lock = threading.Lock()
        self._pause = pause
        self._is_ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(num_clients)]
        self.counts: Counter[str] = Counter()
        """``ok``, and every kind of failure."""

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def num_ok(self) -> int:
        return self.counts["ok"]

    @property
    def failures(self) -> dict[str, int]:
        return {kind: count for kind, count in self.counts.items() if kind != "ok"}

    def wait_for(self, num_more: int, deadline: float = 90.0) -> None:
        """Until that many more requests were answered."""
        wanted, until = self.num_ok + num_more, time.monotonic() + deadline
        while self.num_ok < wanted:
            assert time.monotonic() < until, f"no answers any more: {self.counts}"
            time.sleep(0.05)

    def _ask_on(self) -> None:
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            while not self._is_ended.is_set():
                with self._lock:
                    url, seed = next(self._urls), next(self._seeds)
                outcome = _ask(client, url, seed)
                with self._lock:
                    self.counts[outcome] += 1
                # A client that comes again at once after a fault counts it a thousand times.
                self._is_ended.wait(self._pause if outcome == "ok" else 0.1)


def _ask(client: httpx.Client, url: str, seed: int) -> str:
    sample = data.sample("number", np.random.default_rng(seed))
    buffer = io.BytesIO()
    sample.images[0].save(buffer, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": sample.question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
    try:
        response = client.post(f"{url}/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return type(error).__name__
    return "ok" if response.is_success else f"{response.status_code} {response.json()['error']['code']}"
