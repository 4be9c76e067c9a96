"""The exchange of ViR's scores between the vision servers of one request.

A Flash model compresses the tiles whose score lies above a quantile of all scores of the request. Its images may be on
several servers, so each server is asked for the scores of its images first, and all scores go along with every
``Encode``. What was computed for a score is kept there for that ``Encode``.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.service.errors import InternalError
from protos.vision_pb2 import ScoreRequest
from router.fleet import Fleet
from router.record import Deadline
from router.request import ImageInput
from router.vision_calls import call_vision
from router.workers import VisionWorker


@dataclass(frozen=True, slots=True)
class Scores:
    """What all images of a request scored."""

    of_tiles: Sequence[float]  # every tile of the request, in prompt order
    servers: Sequence[str]  # for each image, the address of the one that knows its tiles now


async def collect_scores(fleet: Fleet, images: Sequence[ImageInput], deadline: Deadline) -> Scores:
    """Ask for the scores of all images at once.

    Raises:
        BaseExceptionGroup: of the errors of ``call_vision``, one at least.
    """
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(_score(fleet, image, deadline)) for image in images]
    answers = [task.result() for task in asked]
    return Scores(
        of_tiles=[score for scores, _ in answers for score in scores], servers=[server for _, server in answers]
    )


async def _score(fleet: Fleet, image: ImageInput, deadline: Deadline) -> tuple[Sequence[float], str]:
    request = ScoreRequest(image_hash=image.image_hash, image=image.data, tiling=image.tiling)

    async def ask(vision: VisionWorker, attempt: int) -> tuple[Sequence[float], str]:
        reply = await vision.score(request, image.num_tiles, deadline.remaining())
        scores = list(reply.scores)
        if len(scores) != image.num_tiles or not all(math.isfinite(score) for score in scores):
            raise InternalError("a server scored other tiles than it was asked for")
        return scores, vision.address

    return await call_vision(fleet, image.image_hash, ask, param=image.param, num_tiles=image.num_tiles)
