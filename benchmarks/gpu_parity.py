"""Whether a GPU computes what it should: attention backends, CUDA graphs, compiled layers, and features of images, each
against plain ways.

    python -m benchmarks gpu_parity --device cuda:0 --results benchmarks/results

Attention over random batches is compared with the same in float64; logits of a random model whose steps are replayed,
or whose layers are compiled, with the same model run operation by operation. Features: see gpu_parity_vision.py. Ends
with status 1 if anything is off.
"""

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.engine_subjects import NoImages, fill_randomly, random_prompts, text_config
from benchmarks.gpu_parity_vision import vision_cases
from benchmarks.random_checkpoint import TextShape
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.tables import Table
from common.model.graphs import Capture, CudaCapture, Repeat
from common.service.errors import InternalError
from language_server.attention import choose_backend
from language_server.attention.base import AttentionBackend, BatchLayout, KVCache, KVShape, LayerCall
from language_server.attention.cpu import CpuBackend
from language_server.attention.flash import FlashBackend
from language_server.attention.sdpa import SdpaBackend
from language_server.attention.triton_paged import TritonBackend
from language_server.backbone import LanguageBackbone, build_model, make_backbone
from language_server.compiled_layers import compile_layers
from language_server.model_runner import ModelRunner
from language_server.scheduler import ScheduledChunk
from language_server.sequence import SamplingParams
from language_server.sequence import Sequence as EngineSequence

LIMITS: Final[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the norm of the difference over the norm of what is right."""
_BATCHES: Final = {
    "one": ([1], [4000]),
    "decode": ([1] * 20, list(range(3, 2003, 100))),
    "prompt": ([700], [700]),
    "mixed": ([1, 1, 300, 17], [5, 900, 1100, 17]),
}
_CALLS: Final = {"plain": (None, False), "window, sinks": (128, True)}
_HEADS, _KV_HEADS, _HEAD_DIM = 16, 4, 128
_MODEL: Final = TextShape(512, 4, 8, 4, 64, 1536, vocab=2048)
_PROMPTS: Final = (3, 40, 17, 64, 5)
_NUM_STEPS: Final = 20
Case = dict[str, Any]
"""``what``, its relative ``error``, and the ``limit``."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_parity", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    cases = [*attention_cases(device), *model_cases(device), *vision_cases(device)]
    print_table(Console(width=120), parity_table(cases))
    if arguments.results:
        print(write_record(arguments.results, "gpu_parity", argv, cases))
    return int(any(not case["error"] <= case["limit"] for case in cases))


def parity_table(cases: Sequence[Case]) -> Table:
    rows = [
        [
            case["what"],
            f"{case['error']:.1e}",
            f"{case['limit']:.0e}",
            "ok" if case["error"] <= case["limit"] else "OFF",
        ]
        for case in cases
    ]
    return Table("Relative error", ["", "found", "allowed", ""], rows)


def attention_cases(device: torch.device) -> Iterator[Case]:
    for name, backend in _backends(device).items():
        for dtype, limit in LIMITS.items():
            if name == "flash" and dtype == torch.float32:
                continue  # flash-attn has 16 bits only
            for batch, (query_lens, seq_lens) in _BATCHES.items():
                for kind, (window, has_sinks) in _CALLS.items():
                    sinks = torch.linspace(-1, 2, _HEADS, device=device).to(dtype) if has_sinks else None
                    call = LayerCall(_HEAD_DIM**-0.5, window, sinks)
                    error = _attention_error(backend, query_lens, seq_lens, call, dtype, device)
                    what = f"{name}, {str(dtype).removeprefix('torch.')}, {batch}, {kind}"
                    yield {"what": what, "error": error, "limit": limit}


def model_cases(device: torch.device) -> Iterator[Case]:
    """Logits of steps in which sequences of unlike lengths generate."""
    backbone = LanguageBackbone(_model(device))
    expected = _decode_logits(backbone, device)
    capture = CudaCapture() if device.type == "cuda" else Repeat
    replayed = _decode_logits(backbone, device, capture=capture)
    yield {"what": "graphs, float32", "error": _relative(replayed, expected), "limit": 1e-4}
    compiled = _decode_logits(backbone, device, compile_with="inductor" if device.type == "cuda" else "aot_eager")
    yield {"what": "compiled, float32", "error": _relative(compiled, expected), "limit": 1e-4}
    fused = _decode_logits(make_backbone(_model(device)), device, capture=capture)
    yield {"what": "fused, graphs, float32", "error": _relative(fused, expected), "limit": 1e-4}


def _backends(device: torch.device) -> dict[str, AttentionBackend]:
    """Those that are there."""
    if device.type == "cpu":
        return {"sdpa": SdpaBackend(), "cpu": CpuBackend()}
    found: dict[str, AttentionBackend] = {"sdpa": SdpaBackend(), "triton": TritonBackend.on(device)}
    return found | ({"flash": FlashBackend()} if importlib.util.find_spec("flash_attn") else {})


def _attention_error(
    backend: AttentionBackend,
    query_lens: list[int],
    seq_lens: list[int],
    call: LayerCall,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Blocks are shuffled, and what no token was written to holds NaN."""
    generator = torch.Generator(device).manual_seed(sum(seq_lens))
    layout = _layout(query_lens, seq_lens, backend.block_size, device, generator)
    num_blocks = int(layout.block_tables.max()) + 2
    cache = KVCache(KVShape(1, _KV_HEADS, _HEAD_DIM, dtype), num_blocks, backend.block_size, device)
    everything = _positions(layout.block_tables, seq_lens, seq_lens, backend.block_size)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.fill_(torch.nan)
        rows = _random((sum(seq_lens), _KV_HEADS, _HEAD_DIM), dtype, generator)
        tensor.flatten(0, 1).index_copy_(0, everything.slot_mapping, rows)
    query = _random((sum(query_lens), _HEADS, _HEAD_DIM), dtype, generator)
    actual = backend.attend(query, cache.keys[0], cache.values[0], backend.plan(layout), call)
    exact = SdpaBackend()
    sinks = None if call.sinks is None else call.sinks.double()
    keys, values = cache.keys[0].double(), cache.values[0].double()
    wide_call = LayerCall(call.scaling, call.sliding_window, sinks)
    expected = exact.attend(query.double(), keys, values, exact.plan(layout), wide_call)
    return _relative(actual, expected)


def _layout(
    query_lens: list[int], seq_lens: list[int], block_size: int, device: torch.device, generator: torch.Generator
) -> BatchLayout:
    counts = [-(-length // block_size) for length in seq_lens]
    order = torch.split(torch.randperm(sum(counts), generator=generator, device=device), counts)
    return _positions(torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True), query_lens, seq_lens, block_size)


def _positions(tables: torch.Tensor, query_lens: list[int], seq_lens: list[int], block_size: int) -> BatchLayout:
    """The last ``query_lens`` tokens of each sequence."""
    positions = [
        torch.arange(length - num_queries, length, device=tables.device)
        for num_queries, length in zip(query_lens, seq_lens, strict=True)
    ]
    return BatchLayout(query_lens, seq_lens, torch.cat(positions), tables, block_size)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _model(device: torch.device) -> Any:
    """The same at every call, with transformers' own layers."""
    model = build_model(text_config(_MODEL), True, dtype=torch.float32, device=device)
    fill_randomly(model)
    return model


def _decode_logits(
    backbone: LanguageBackbone, device: torch.device, *, capture: Capture | None = None, compile_with: str = ""
) -> torch.Tensor:
    """[num_steps * num_prompts, vocab_size]: tokens are given, so that errors do not lead to other tokens."""
    attention, num_tokens = choose_backend(device), max(_PROMPTS) + _NUM_STEPS + 1
    blocks_each = -(-num_tokens // attention.block_size)
    cache = KVCache(backbone.kv_shape, len(_PROMPTS) * blocks_each + 1, attention.block_size, device)
    if compile_with:
        compile_layers(backbone.model, cache, compile_with)
    runner = ModelRunner(backbone, cache, attention, NoImages())
    if capture is not None:
        runner.capture_graphs(8, num_tokens, capture)
        if not runner.has_graphs:
            raise InternalError("the model could not be captured; the log says why")
    sequences = []
    for number, length in enumerate(_PROMPTS):
        prompt = random_prompts(1, length, backbone.vocab_size)[0]
        sequence = EngineSequence(number, b"", prompt, SamplingParams(max_tokens=_NUM_STEPS + 1))
        sequence.block_table = list(range(number * blocks_each, (number + 1) * blocks_each))
        sequences.append(sequence)
    logits = []
    for step in range(_NUM_STEPS + 1):
        found = [_run(runner, [sequence]) for sequence in sequences] if step == 0 else [_run(runner, sequences)]
        logits += found
        for sequence in sequences:
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.append((7 * step + sequence.seq_id) % backbone.vocab_size)
    return torch.cat(logits)


def _run(runner: ModelRunner, sequences: Sequence[EngineSequence]) -> torch.Tensor:
    chunks = [ScheduledChunk(each, each.num_computed_tokens, each.num_tokens) for each in sequences]
    return runner.run([runner.prepare(chunk) for chunk in chunks]).clone()


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN stays NaN, which is within no limit."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
