"""How many frames of a video are looked at: the part, else the request, else the configuration.

The fields are vLLM's: so many frames, or so many for each second of the video, or the fewer of both. What the second
needs, the length, only a vision server can tell. Knows nothing of tiles and prompts.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from common.service import metrics
from common.service.errors import InternalError, InvalidRequest
from protos.vision_pb2 import ProbeReply, ProbeRequest
from router.api.schemas import ChatCompletionRequest, MediaIo, VideoIo, VideoUrl
from router.causes import cause_of
from router.fleet import Fleet
from router.record import Deadline
from router.settings import RouterSettings
from router.vision_calls import call_vision
from router.workers import VisionWorker

_NO_LIMIT: Final = -1


@dataclass(frozen=True, slots=True)
class FrameWish:
    """At most ``limit`` frames, spread over the whole video."""

    limit: int
    fps: float | None = None  # and at most so many for each second
    is_exact: bool = True  # ``limit`` it is, however short the video

    def count(self, length: ProbeReply) -> int:
        """Frames of a video of this length, at least one."""
        count = self.limit
        if self.fps is not None:
            count = min(count, round(length.seconds * self.fps))
        if length.num_frames:
            count = min(count, length.num_frames)
        return max(1, count)


def resolve_frames(source: VideoUrl, request: ChatCompletionRequest, settings: RouterSettings, param: str) -> FrameWish:
    """What is wanted of one video. A part that says either number says both: nothing of the request's is added to it.

    Raises:
        InvalidRequest: ``too_many_media_items`` for more frames than allowed.
    """
    asked, where = VideoIo(source.num_frames, source.fps), param
    if asked == VideoIo():
        asked, where = (request.media_io_kwargs or MediaIo()).video or VideoIo(), "media_io_kwargs.video"
    for name in ("num_frames", "fps"):
        value = getattr(asked, name)
        if value is not None and value <= 0 and value != _NO_LIMIT:
            raise InvalidRequest(f"{name} must be positive, or {_NO_LIMIT} for no limit", param=f"{where}.{name}")
    cap = settings.max_video_frames
    if asked.num_frames is not None and asked.num_frames > cap:
        metrics.MEDIA_REJECTED.labels("items").inc()
        message = f"at most {cap} frames of a video are allowed"
        raise InvalidRequest(message, code="too_many_media_items", param=f"{where}.num_frames")
    fps = None if asked.fps == _NO_LIMIT else asked.fps
    if asked.num_frames == _NO_LIMIT or (asked.num_frames is None and fps is not None):
        return FrameWish(cap, fps, is_exact=False)
    return FrameWish(asked.num_frames or settings.video_frames, fps, is_exact=fps is None)


async def probe_lengths(fleet: Fleet, videos: Sequence[tuple[bytes, str]], deadline: Deadline) -> list[ProbeReply]:
    """Ask the vision tier how long these videos are.

    Args:
        videos: files, and where they stand in the request.

    Raises:
        InvalidRequest: one of them cannot be read.
        Unavailable, Overloaded, InternalError, DeadlineExceeded: as ``call_vision``.
    """
    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(_probe(fleet, data, param, deadline)) for data, param in videos]
    except BaseExceptionGroup as errors:
        raise cause_of(errors) from None
    return [task.result() for task in asked]


async def _probe(fleet: Fleet, data: bytes, param: str, deadline: Deadline) -> ProbeReply:
    request = ProbeRequest(video=data)

    async def ask(vision: VisionWorker, attempt: int) -> ProbeReply:
        reply = await vision.probe(request, deadline.remaining())
        if not (math.isfinite(reply.seconds) and reply.seconds >= 0):
            raise InternalError("a server found a length that no video has")
        return reply

    return await call_vision(fleet, blake3(data, max_threads=1).digest(), ask, param=param)
