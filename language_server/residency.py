"""Images of a request that need no features, because their keys and values lie in the prefix cache.

The cache is asked twice: from outside, which costs nobody anything and is out of date at once; and, where that finds an
image, in the engine's thread, which then holds the blocks (prefix_holds.py). Images of a Flash checkpoint have as many
rows as their encoder says. Of those that were here before it is known; a prompt is looked up as far as it is.
"""

import asyncio
from collections.abc import Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final

from language_server.engine_thread import EngineThread
from language_server.feature_image import ImageKey, tile_hashes
from language_server.features import FeatureStore
from language_server.prompt import Prompt
from language_server.sequence import SamplingParams, Sequence
from protos.language_pb2 import GenerateRequest

_INLINE_TOKENS: Final = 4096
"""Hashing more of them would hold up everybody's tokens."""


@dataclass(frozen=True, slots=True)
class Residency:
    """One request's prompt as far as its length is known.

    ``holder`` stands for the request while blocks are held: sequences name it, and aborting it ends the hold.
    ``tile_tokens`` has the rows of each tile of the images that are laid out, by index.
    """

    holder: Sequence
    tile_tokens: Mapping[int, Items[int]]

    async def is_likely(self, engine: EngineThread, executor: Executor) -> bool:
        """Whether some image lies in the cache now, by a look from outside: for a long prompt from ``executor``."""
        holder = self.holder
        if holder.num_tokens < _INLINE_TOKENS:
            num_tokens = engine.num_cached_tokens(holder)
        else:
            look = partial(engine.num_cached_tokens, holder)
            num_tokens = await asyncio.get_running_loop().run_in_executor(executor, look)
        return holder.image_spans.whole_end(num_tokens, engine.block_size) > 0

    async def hold(self, engine: EngineThread) -> Mapping[int, Items[int]]:
        """Of ``tile_tokens`` what is held from now on. Raises Unavailable when the engine has died."""
        num_tokens = await engine.hold(self.holder)
        spans = self.holder.image_spans.until(num_tokens)
        return {span.image_index: self.tile_tokens[span.image_index] for span in spans}


def look_up(
    prompt: Prompt,
    request: GenerateRequest,
    keys: Items[ImageKey],
    features: FeatureStore,
    *,
    seq_id: int,
    max_model_len: int,
) -> Residency | None:
    """None: all features are here, or nothing is known of the first image."""
    if all(map(features.has, keys)):
        return None
    known = {index: sizes for index, key in enumerate(keys) if (sizes := features.known_tiles(key)) is not None}
    tile_tokens = [known.get(index, ()) for index in range(len(keys))]
    hashes = [tile_hashes(key, sizes, features.layout) for key, sizes in zip(keys, tile_tokens, strict=True)]
    num_tiles = [None if index in known else 0 for index in range(len(keys))]
    ids, spans = prompt.until(num_tiles).lay_out(tile_tokens, hashes)
    if not len(spans):
        return None
    most = prompt.num_text_tokens + sum(key.max_num_tokens for key in keys) + (request.sampling.max_tokens or 2**31)
    holder = Sequence(
        seq_id=seq_id,
        request_id=request.request_id,
        prompt_token_ids=ids,
        sampling=SamplingParams(max_tokens=max(1, min(most, max_model_len) - len(ids))),
        image_spans=spans,
        cache_scope=request.cache_scope,
    )
    return Residency(holder, known)
