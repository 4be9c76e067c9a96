"""Both engines of a checkpoint, alone in this process: what a hardware card says of the two tiers.

Each is loaded, warmed up and measured as a server of its own on this device would have it, the vision engine first,
and is gone before the next is loaded. Sizes that one round cannot afford are left out, the largest first.
"""

import gc
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, Literal

import torch

from benchmarks.engine_subjects import OurEngine
from benchmarks.profile.turns import Effort, Sizes, Work, affordable, take_turns
from benchmarks.simulator.hardware import DecodePoint, LanguageRates, PrefillPoint, VisionPoint, VisionRates
from benchmarks.vision_subjects import pictures, random_tiles
from common.model.checkpoint import Checkpoint
from common.model.config import InternVLConfig, load_config
from common.model.device import choose_device, choose_dtype
from common.service.errors import ConfigError
from language_server.backbone import load_backbone
from language_server.engine import EngineConfig
from language_server.quantization import choose_quantization
from vision_server.encoder import VisionEncoder
from vision_server.media import decode, open_image
from vision_server.tiling import make_tiles

_NUM_STEPS: Final = 16
"""Steps of a batch that are looked at in each round."""
_NUM_PICTURES: Final = 4


def measure_vision(
    path: Path, device: str, dtype: Literal["auto", "bfloat16", "float32"], sizes: Sequence[int], effort: Effort
) -> VisionRates:
    """Tiles in host memory to features in host memory, by batch; and pictures to tiles, on one core.

    Raises:
        ConfigError: a device that is not here.
        CheckpointError: files that hold no such model.
    """
    config = load_config(path)
    encoder = VisionEncoder(config, device, dtype)
    encoder.load(path)
    encoder.warm_up()
    max_batch = encoder.preferred_batch_tiles
    tiles = random_tiles(max_batch, config.tiling.tile_size)

    def encode(num_tiles: int) -> float:
        started = time.perf_counter()
        encoder.encode(tiles[:num_tiles])
        return time.perf_counter() - started

    fitting = affordable([*(size for size in sizes if size < max_batch), max_batch], encode, effort.limit)
    times = take_turns({size: partial(encode, size) for size in fitting}, effort.seconds, effort.rounds)
    return VisionRates(
        max_batch=max_batch,
        image_s_per_tile=_image_seconds_per_tile(config, effort.rounds),
        tiles=tuple(VisionPoint(batch=size, tiles_per_s=size / median(took)) for size, took in times.items()),
    )


def measure_language(
    path: Path, device: str, dtype: Literal["auto", "bfloat16", "float32"], sizes: Sizes, effort: Effort
) -> LanguageRates:
    """Prompts by length and number, steps by batch and context, with the KV memory a server has.

    Raises:
        ConfigError: a device that is not here, or sizes of which none fits the model.
        CheckpointError: files that hold no such model.
    """
    config = load_config(path)
    lengths = _up_to("lengths", sizes.lengths, config.max_model_len - 1)
    contexts = _up_to("contexts", sizes.contexts, config.max_model_len - 2 * _NUM_STEPS - 1)
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    checkpoint = Checkpoint.open(path)
    quantization = choose_quantization("auto", checkpoint, config, dtype=precision, device=where)
    backbone = load_backbone(checkpoint, config, dtype=precision, device=where, quantization=quantization)
    usual = EngineConfig(config.max_model_len)
    most = max(usual.max_num_seqs, *sizes.batches, *sizes.prompts)
    limits = EngineConfig(
        max_model_len=config.max_model_len,
        max_num_seqs=most,
        max_num_batched_tokens=max(usual.max_num_batched_tokens, 2 * most),
        max_num_waiting=most,
        enable_prefix_caching=False,  # every round has the same prompts
        use_cuda_graphs=quantization.is_capturable,
    )
    subject = OurEngine(backbone, limits)
    prefill = _prefill(subject, _up_to("lengths", lengths, subject.kv_tokens - 1), sizes.prompts, effort)
    largest = max(prefill, key=lambda point: (point.batch, point.length))
    decode = _decode(subject, sizes.batches, contexts, limits.max_num_batched_tokens, largest.tokens_per_s, effort)
    return LanguageRates(
        kv_tokens=subject.kv_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        bytes_per_token=config.text_hidden_size * precision.itemsize,
        prefill=prefill,
        decode=decode,
    )


def release(device: str) -> None:
    """Memory of an engine that nobody holds any more."""
    gc.collect()
    if choose_device(device).type == "cuda":
        torch.cuda.empty_cache()


def _prefill(
    subject: OurEngine, lengths: Sequence[int], numbers: Sequence[int], effort: Effort
) -> tuple[PrefillPoint, ...]:
    lengths = affordable(lengths, subject.prefill, effort.limit)
    rate = lengths[-1] / subject.prefill(lengths[-1])
    fitting = [n for n in sorted(set(numbers)) if _fits(n, lengths[-1], subject.kv_tokens, rate, effort.limit)]
    grid = [(number, length) for number in fitting or [1] for length in lengths]
    for number, length in grid:
        subject.prefill(length, number)
    work: dict[tuple[int, int], Work] = {(n, length): partial(subject.prefill, length, n) for n, length in grid}
    times = take_turns(work, effort.seconds, effort.rounds)
    return tuple(
        PrefillPoint(length=length, batch=n, tokens_per_s=n * length / median(took))
        for (n, length), took in times.items()
    )


def _decode(
    subject: OurEngine,
    batches: Sequence[int],
    contexts: Sequence[int],
    max_num_batched_tokens: int,
    prompt_tokens_per_s: float,
    effort: Effort,
) -> tuple[DecodePoint, ...]:
    """Before it generates, a batch must have read its prompts: that bounds what can be afforded, batches first."""
    rate, limit, room = prompt_tokens_per_s, effort.limit, subject.kv_tokens
    numbers = [n for n in sorted(set(batches)) if _fits(n, contexts[0], room, rate, limit)] or [1]
    lengths = [each for each in contexts if _fits(numbers[-1], each, room, rate, limit)] or contexts[:1]

    def steps(batch: int, context: int) -> float:
        # Its prompts are read over several steps, in which those that are done generate already.
        num_reading = -(-batch * context // (max_num_batched_tokens - batch)) + 1
        prompt = max(1, context - num_reading - _NUM_STEPS // 2)
        return median(subject.decode_steps(batch, num_reading + _NUM_STEPS, prompt))

    grid = [(batch, context) for batch in numbers for context in lengths]
    for batch, context in grid:
        steps(batch, context)
    work: dict[tuple[int, int], Work] = {pair: partial(steps, *pair) for pair in grid}
    times = take_turns(work, effort.seconds, effort.rounds)
    return tuple(
        DecodePoint(batch=batch, context=context, step_s=median(took)) for (batch, context), took in times.items()
    )


def _up_to(name: str, sizes: Sequence[int], most: int) -> list[int]:
    """Rising. Raises ConfigError where none is left."""
    fitting = [size for size in sorted(set(sizes)) if size <= most]
    if not fitting:
        raise ConfigError(f"{name} {min(sizes)}: this model and its KV memory take 1 to {most}")
    return fitting


def _fits(number: int, length: int, kv_tokens: int, tokens_per_s: float, limit: float) -> bool:
    """``number`` prompts of ``length`` tokens: in KV memory with what they generate, and read in time."""
    return number * (length + 4 * _NUM_STEPS) <= kv_tokens and number * length / tokens_per_s <= limit


def _image_seconds_per_tile(config: InternVLConfig, num_rounds: int) -> float:
    """CPU seconds from JPEG to tiles, of pictures of five tiles."""
    data = pictures(_NUM_PICTURES)
    num_tiles = sum(len(make_tiles(decode(open_image(each)), config.tiling)) for each in data)
    rounds = []
    for _ in range(num_rounds):
        used = time.thread_time()
        for each in data:
            make_tiles(decode(open_image(each)), config.tiling)
        rounds.append(time.thread_time() - used)
    return median(rounds) / num_tiles
