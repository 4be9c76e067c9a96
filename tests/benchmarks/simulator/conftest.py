"""Cards whose figures are round, so that what a simulation should say can be worked out by hand."""

from typing import Any

from benchmarks.simulator.hardware import (
    DecodePoint,
    HardwareCard,
    LanguageRates,
    PrefillPoint,
    RouterRates,
    Source,
    TransportRates,
    VisionPoint,
    VisionRates,
)

TILE_S, PREFILL_TOKEN_S, STEP_S = 0.1, 1e-4, 0.01


def round_card(speed: float = 1.0, **language: Any) -> HardwareCard:
    """A tile, a token and a step take the constants above, divided by ``speed``; transport and router take nothing."""
    return HardwareCard(
        name="round",
        model="any",
        source=Source(kind="computed", text="by hand"),
        hardware="none",
        vision=VisionRates(
            max_batch=8, tiles=tuple(VisionPoint(batch=batch, tiles_per_s=speed / TILE_S) for batch in (1, 8))
        ),
        language=LanguageRates(
            **{
                "kv_tokens": 100_000,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 2048,
                "bytes_per_token": 2,
                "prefill": tuple(PrefillPoint(length=n, tokens_per_s=speed / PREFILL_TOKEN_S) for n in (1, 10_000)),
                "decode": tuple(
                    DecodePoint(batch=batch, context=context, step_s=STEP_S / speed)
                    for batch in (1, 64)
                    for context in (1, 10_000)
                ),
                **language,
            }
        ),
        transports={"tcp": TransportRates(gb_per_s=1e6)},
        router=RouterRates(s_per_request=0.0),
    )
