"""The vision side of a chat request: every image that a language server lacks is encoded somewhere and delivered to it.

Knows nothing of HTTP and nothing of pixels. All calls live inside ``encode_missing`` and end with it.
"""

import asyncio
import time

from common.service.errors import InternalError, Overloaded, Unavailable
from protos.language_pb2 import Admitted, ImageTicket
from protos.vision_pb2 import EncodeReply, EncodeRequest, VirOptions
from router.fleet import Fleet
from router.record import RequestRecord
from router.request import ChatRequest
from router.scores import Scores, collect_scores
from router.vision_calls import call_vision
from router.workers import VisionWorker


async def encode_missing(fleet: Fleet, request: ChatRequest, admitted: Admitted, record: RequestRecord) -> None:
    """Have all images encoded that the language server lacks, once all scores are known where they are needed.

    Raises what ``call_vision`` raises; of several images, in a group.
    """
    scores = await _collect_scores(fleet, request, record) if request.needs_scores else None
    async with asyncio.TaskGroup() as group:
        for ticket in admitted.missing:
            group.create_task(_encode(fleet, request, ticket, admitted, scores, record))


async def _collect_scores(fleet: Fleet, request: ChatRequest, record: RequestRecord) -> Scores:
    started_at = time.monotonic()
    scores = await collect_scores(fleet, request.images, request.deadline)
    record.score_seconds = time.monotonic() - started_at
    return scores


async def _encode(
    fleet: Fleet,
    request: ChatRequest,
    ticket: ImageTicket,
    admitted: Admitted,
    scores: Scores | None,
    record: RequestRecord,
) -> None:
    """Have one image encoded and delivered."""
    index = ticket.image_index
    if index >= len(request.images):
        raise InternalError("a server asked for an image that does not exist")
    image = request.images[index]
    call = EncodeRequest(
        request_id=request.generate.request_id,
        image_index=index,
        mm_hash=image.mm_hash,
        image_hash=image.image_hash,
        image=image.data,
        tiling=image.tiling,
        vir=_with_scores(request.vir, scores),
        deliver_to=admitted.deliver_to,
        ticket=ticket.ticket,
        dtype=admitted.dtype,
    )

    async def encode(vision: VisionWorker, attempt: int) -> EncodeReply:
        call.attempt = attempt
        record.encode_attempts += 1
        return await vision.encode(call, image.num_tiles, request.deadline.remaining())

    prefer = scores.servers[index] if scores is not None else None
    try:
        reply = await call_vision(fleet, image.image_hash, encode, param=image.param, prefer=prefer)
    except (Unavailable, Overloaded, InternalError):
        # A token needs the whole prompt: the features had arrived, only the reply that says so was lost.
        if not record.has_first_token:
            raise
    else:
        record.encoded.append(reply)


def _with_scores(vir: VirOptions | None, scores: Scores | None) -> VirOptions | None:
    """The options of one ``Encode``: those of the request, and what its tiles are compared with."""
    if vir is None or scores is None:
        return vir
    complete = VirOptions(request_scores=scores.of_tiles)
    complete.MergeFrom(vir)
    return complete
