"""How much of what a card can do the language engine gets out of it, in the shapes of released models.

    python -m benchmarks engine --device cuda:0 --shape 8B --results benchmarks/results

The card is measured first (card.py). Then decode, as bytes of weights and KV that a step must read, and a long prompt,
as the operations of its matrix products and its attention. Weights are random, made on the card. Steps end when their
tokens are on the host, so their time is all there is.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

import torch

from benchmarks.card import Card
from benchmarks.engine_subjects import OurEngine, fill_randomly, text_config
from benchmarks.random_checkpoint import TextShape
from benchmarks.tables import NONE, Table, number
from language_server.attention import choose_backend
from language_server.backbone import LanguageBackbone, build_model, make_backbone
from language_server.engine import EngineConfig

MODES: Final = ("eager", "graphs", "compiled", "fused")
"""``eager``: transformers' layers. ``graphs``: the same, and decode replays CUDA graphs, as it does in what follows.
``compiled``: layers that torch.compile made. ``fused``: our own, as a server has them."""
_TARGETS: Final = {"decode, batch 1": 0.7, "decode, batch 64": 0.6, "prefill": 0.6}
_PREFILL_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Load:
    """Each batch generates ``num_tokens`` behind prompts of ``context`` tokens; one prompt has ``prefill`` tokens."""

    batches: tuple[int, ...] = (1, 64)
    context: int = 512
    num_tokens: int = 64
    prefill: int = 4096


def make_random_model(shape: TextShape, dtype: torch.dtype, device: torch.device) -> Any:
    """Output weights of its own, as the members from 8B on have them."""
    model = build_model(text_config(shape), False, dtype=dtype, device=device)
    fill_randomly(model)
    return model


def measure(model: Any, shape: TextShape, card: Card, load: Load, modes: Sequence[str]) -> list[dict[str, Any]]:
    """A record of each mode and case; modes in the order of ``MODES``: each changes the model, and none goes back."""
    records: list[dict[str, Any]] = []
    for mode in sorted(modes, key=MODES.index):
        backbone = make_backbone(model) if mode == "fused" else LanguageBackbone(model)
        engine = OurEngine(backbone, _config(backbone, load, mode))
        cases = [_decode(engine, backbone, shape, card, load, batch) for batch in load.batches]
        cases.append(_prefill(engine, shape, card, load))
        records += [{"mode": mode, **case, "start_s": engine.start_seconds, **asdict(card)} for case in cases]
        del engine
        gc.collect()
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()  # the next engine makes a KV memory of its own
    return records


def shares_table(shape: str, card: Card, records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for record in records:
        target = _TARGETS.get(record["case"])
        rows.append(
            [
                record["mode"],
                record["case"],
                number(record["seconds"] * 1e3),
                number(record["tokens_per_s"]),
                f"{record['share']:.0%}",
                NONE if target is None else f"{target:.0%}",
            ]
        )
    title = f"{shape}, random weights, {card.name}"
    note = f"copies {card.copy_bytes_per_s / 1e9:.0f} GB/s, multiplies {card.matmul_flop_per_s / 1e12:.1f} TFLOP/s"
    return Table(title, ["", "", "ms", "tokens/s", "share", "target"], rows, num_labels=2, notes=[note])


def _config(backbone: LanguageBackbone, load: Load, mode: str) -> EngineConfig:
    max_num_seqs, longest = max(load.batches), load.context + load.num_tokens + 1
    block_size = choose_backend(backbone.device).block_size
    num_tokens = max(max_num_seqs * (longest + block_size), load.prefill + 2 * block_size)
    return EngineConfig(
        max_model_len=max(longest, load.prefill + 1),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=load.prefill,
        kv_cache_bytes=num_tokens * backbone.kv_shape.bytes_per_block(1),
        block_size=block_size,
        enable_prefix_caching=False,
        use_cuda_graphs=mode != "eager",
        compile_layers=mode == "compiled",
    )


def _decode(
    engine: OurEngine, backbone: LanguageBackbone, shape: TextShape, card: Card, load: Load, batch: int
) -> dict[str, Any]:
    step = median(engine.decode_steps(batch, load.num_tokens, load.context))
    kv_bytes = batch * (load.context + load.num_tokens / 2) * backbone.kv_shape.bytes_per_block(1)
    read = weights_read(shape) * backbone.dtype.itemsize + kv_bytes
    return {
        "case": f"decode, batch {batch}",
        "seconds": step,
        "tokens_per_s": batch / step,
        "bytes_or_operations": read,
        "share": read / step / card.copy_bytes_per_s,
    }


def _prefill(engine: OurEngine, shape: TextShape, card: Card, load: Load) -> dict[str, Any]:
    took = median([engine.prefill(load.prefill) for _ in range(_PREFILL_ROUNDS + 1)][1:])
    operations = prefill_operations(shape, load.prefill)
    return {
        "case": "prefill",
        "seconds": took,
        "tokens_per_s": load.prefill / took,
        "bytes_or_operations": operations,
        "share": operations / took / card.matmul_flop_per_s,
    }


def weights_read(shape: TextShape) -> int:
    """Of the matrices that every step reads whole, the output's included."""
    return shape.layers * _layer_weights(shape) + shape.hidden * shape.vocab


def prefill_operations(shape: TextShape, num_tokens: int) -> int:
    """Of a prompt: two for each weight and token, and those of causal attention. Only its last token has logits."""
    attention = 2 * num_tokens**2 * shape.heads * shape.head_dim  # scores and values, half of each
    products = 2 * num_tokens * _layer_weights(shape)
    return shape.layers * (products + attention) + 2 * shape.hidden * shape.vocab


def _layer_weights(shape: TextShape) -> int:
    heads = 2 * shape.heads + 2 * shape.kv_heads  # query and output, key and value
    return shape.hidden * (heads * shape.head_dim + 3 * shape.mlp)
