"""What lies between and before the tiers, on this machine: transports between two processes, and the router."""

import asyncio
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from benchmarks import router, transport
from benchmarks.overhead import pinned
from benchmarks.profile.turns import Effort
from benchmarks.simulator.hardware import RouterRates, TransportRates
from common.service.errors import ConfigError
from common.transport.registry import TRANSPORTS, why_unavailable

_TILES_OF_IMAGE: Final = 13
"""The most that an image has by default."""
_TINY_HIDDEN: Final = 8
_BATCH_BYTES: Final = 32 * 10**6
_BATCHES_PER_SECOND: Final = 40
"""About, of all transports together: what decides how many rounds there are time for."""
_IMAGE_BYTES: Final = 150_000
_FEW_TOKENS, _MANY_TOKENS = 1, 64
_TURNS: Final = 2 * 3 * 2
"""Loads, subjects, and measurements of each, in a round of the router's benchmark."""


def chosen_transports(names: Sequence[str]) -> list[str]:
    """Those of ``names``, or all there are. Raises ConfigError for one that is not there."""
    here = [name for name in TRANSPORTS if not why_unavailable(name)]
    for name in names:
        if name not in here:
            raise ConfigError(f"transports {name[:64]}: this machine has {', '.join(here)}")
    return [*names] or [*here]


def measure_transports(
    names: Sequence[str], hidden_size: int, effort: Effort, show: Callable[[str], None]
) -> dict[str, TransportRates]:
    """One message on its way at a time: a tiny one says the latency, the features of a whole image the rate beyond it.

    Sender and receiver are on one machine: between two, a network is slower than what is found here.
    """
    image = transport.make_message(_TILES_OF_IMAGE, hidden_size, _BATCH_BYTES)
    tiny = transport.make_message(1, _TINY_HIDDEN, 2**19)
    num_rounds = max(effort.rounds, round(effort.seconds * _BATCHES_PER_SECOND / (4 * max(1, len(names)))))
    with pinned(*transport.SENDING):
        cases = asyncio.run(transport.measure(names, [tiny, image], num_rounds, 1, show))
    took = {(case.subject, case.message): case.microseconds / 1e6 for case in cases}
    sizes = len(tiny.payload), len(image.payload)
    return {name: transport_rates(sizes, (took[name, tiny.name], took[name, image.name])) for name in names}


def transport_rates(num_bytes: tuple[int, int], seconds: tuple[float, float]) -> TransportRates:
    """The line through a small and a large message; where the large one took no longer, its rate alone."""
    more_bytes, longer = num_bytes[1] - num_bytes[0], seconds[1] - seconds[0]
    if longer <= 0:
        return TransportRates(gb_per_s=num_bytes[1] / seconds[1] / 1e9)
    latency = max(0.0, seconds[0] - num_bytes[0] * longer / more_bytes)
    return TransportRates(gb_per_s=more_bytes / longer / 1e9, latency_s=latency)


def measure_router(effort: Effort) -> RouterRates:
    """CPU of a router whose servers do nothing: requests with a picture, few tokens and many.

    Raises:
        Unavailable: a program did not start.
    """
    loads = [router.image_load(_IMAGE_BYTES, num_tokens) for num_tokens in (_FEW_TOKENS, _MANY_TOKENS)]
    each = effort.seconds / (_TURNS * effort.rounds)
    few, many = (cpu_per_request(case) for case in router.measure(loads, router.Options(effort.rounds, each)))
    return router_rates((_FEW_TOKENS, few), (_MANY_TOKENS, many))


def cpu_per_request(case: router.Case) -> float:
    """Seconds, the median of the rounds."""
    turns = [turn for turn in case.turns if turn["subject"] == "router"]
    return float(median(turn["core_busy"] / turn["requests_per_s"] for turn in turns))


def router_rates(few: tuple[int, float], many: tuple[int, float]) -> RouterRates:
    """From (tokens of a request, its CPU seconds) twice: what a token costs, and a request without any."""
    per_token = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
    return RouterRates(s_per_request=max(0.0, few[1] - few[0] * per_token), s_per_token=per_token)
