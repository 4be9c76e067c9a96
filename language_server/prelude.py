"""What of a prompt can be computed before anybody knows how long its images are: all that stands before the first tile
that has not come, while vision servers work on it. The sequences that follow find it in the prefix cache.

To the engine a prelude is a sequence like any other that waits for features; its last row never comes. When more tiles
are here, a longer one takes its place and finds in the cache what it has computed.
"""

from language_server.image_spans import ImageSpan, ImageSpans
from language_server.prompt import Prompt
from language_server.reservation import Lease
from language_server.sequence import SamplingParams, Sequence
from protos.language_pb2 import GenerateRequest


def make_prelude(
    prompt: Prompt,
    request: GenerateRequest,
    lease: Lease,
    *,
    seq_id: int,
    block_size: int,
    priority: int,
    holder: Sequence | None = None,
    before: Sequence | None = None,
) -> Sequence | None:
    """A sequence to be aborted once all images are there; None: it would not fill a block more than the one
    ``before``, and only blocks are found.

    It must not live longer than ``lease``, some of whose images have not come.
    """
    ids, spans = prompt.until(lease.num_known_tiles).lay_out(lease.tile_tokens, lease.tile_hashes)
    num_tokens = len(ids) // block_size * block_size
    if num_tokens <= (0 if before is None else before.num_prompt_tokens - 1):
        return None
    index = min(lease.awaited)
    never = ImageSpan(index, num_tokens, 1, b"", first_row=request.images[index].max_num_tokens)
    if before is not None and before.num_reached_tokens:
        before.prelude = None  # it knows of all it has found, and the line of them would only grow
    return Sequence(
        seq_id=seq_id,
        request_id=request.request_id,
        prompt_token_ids=[*ids[:num_tokens], prompt.image_token_id],
        sampling=SamplingParams(max_tokens=1),
        image_spans=ImageSpans([*spans.until(num_tokens), never]),
        cache_scope=request.cache_scope,
        priority=priority,
        prelude=before,
        holder=holder,
    )
