"""The vision side of a chat request: every image that a language server lacks is encoded somewhere and delivered to it.

Knows nothing of HTTP and nothing of pixels. All calls live inside ``encode_missing`` and end with it.
"""

import asyncio
import time
from collections.abc import Sequence

from common.service.errors import InternalError, Overloaded, Unavailable
from protos.language_pb2 import Admitted, ImageTicket
from protos.vision_pb2 import EncodeReply, EncodeRequest, VirOptions
from router.fleet import Fleet
from router.record import RequestRecord
from router.request import ChatRequest, ImageInput
from router.scores import Scores, collect_scores
from router.splitting import WHOLE, Part, divide
from router.vision_calls import call_vision
from router.workers import VisionWorker


async def encode_missing(fleet: Fleet, request: ChatRequest, admitted: Admitted, record: RequestRecord) -> None:
    """Have all images encoded that the language server lacks, once all scores are known where they are needed.

    Raises what ``call_vision`` raises; of several images, in a group.
    """
    scores = await _collect_scores(fleet, request, record) if request.needs_scores else None
    async with asyncio.TaskGroup() as group:
        for ticket in admitted.missing:
            for part in _divide(fleet, request, _image_of(request, ticket)):
                group.create_task(_encode(fleet, request, ticket, part, admitted, scores, record))


async def _collect_scores(fleet: Fleet, request: ChatRequest, record: RequestRecord) -> Scores:
    started_at = time.monotonic()
    scores = await collect_scores(fleet, request.images, request.deadline)
    record.score_started_at, record.score_seconds = started_at, time.monotonic() - started_at
    return scores


def _image_of(request: ChatRequest, ticket: ImageTicket) -> ImageInput:
    if ticket.image_index >= len(request.images):
        raise InternalError("a server asked for an image that does not exist")
    return request.images[ticket.image_index]


def _divide(fleet: Fleet, request: ChatRequest, image: ImageInput) -> Sequence[Part]:
    """Who gets which tiles: the server on which equal images meet the first ones, others that are idle the rest."""
    min_tiles = request.split_min_tiles
    if not request.may_divide(image) or image.num_tiles < 2 * min_tiles:
        return WHOLE
    excluded = {worker.address for worker in fleet.vision if worker.total_load >= min_tiles}
    chosen: list[VisionWorker] = []
    while len(chosen) < image.num_tiles // min_tiles:
        worker = fleet.pick_vision(image.image_hash, exclude=excluded)
        if worker is None:
            break
        chosen.append(worker)
        excluded.add(worker.address)
    rates = [worker.status.vision.tiles_per_second for worker in chosen if worker.status is not None]
    return divide(image.num_tiles, [worker.address for worker in chosen], min_tiles, min(rates, default=0.0))


async def _encode(
    fleet: Fleet,
    request: ChatRequest,
    ticket: ImageTicket,
    part: Part,
    admitted: Admitted,
    scores: Scores | None,
    record: RequestRecord,
) -> None:
    """Have one image, or part of one, encoded and delivered. A part has attempts of its own."""
    index, image = ticket.image_index, _image_of(request, ticket)
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
        seals_features=admitted.seals_features,
        dtype=admitted.dtype,
        first_tile=part.first_tile,
        num_tiles=part.num_tiles,
    )
    num_tiles = part.num_tiles or image.num_tiles

    async def encode(vision: VisionWorker, attempt: int) -> EncodeReply:
        call.attempt = attempt
        with record.encode(vision.name, index) as encoding:
            encoding.reply = await vision.encode(call, num_tiles, request.deadline.remaining())
            return encoding.reply

    prefer = part.server if scores is None else scores.servers[index]
    try:
        reply = await call_vision(
            *(fleet, image.image_hash, encode), param=image.param, prefer=prefer, num_tiles=num_tiles, is_hedged=True
        )
    except (Unavailable, Overloaded, InternalError):
        # A token needs the whole prompt: the features had arrived, only the reply that says so was lost.
        if not record.is_prompt_read:
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
