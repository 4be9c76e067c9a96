"""Media that a request names by ``https:`` URL: fetched before its messages are read, each URL once, all at a time."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.service import metrics, tracing
from common.service.errors import DeadlineExceeded, RequestTooLarge
from router.admission import HeldBytes
from router.api.media_parts import check_num_items
from router.api.schemas import ChatCompletionRequest, ImageUrl, Part, VideoUrl
from router.causes import cause_of
from router.fetch.fetcher import MediaFetcher
from router.record import Deadline
from router.settings import RouterSettings


@dataclass(slots=True)
class _Wanted:
    """One URL. Where it is named more than once, the largest of the bounds holds here."""

    param: str
    max_bytes: int


async def fetch_media(
    request: ChatCompletionRequest,
    fetcher: MediaFetcher | None,
    settings: RouterSettings,
    held: HeldBytes,
    deadline: Deadline,
) -> Mapping[str, bytes]:
    """What is behind each ``https:`` URL of a request; nothing where URLs are not allowed, which their reader will say.

    Args:
        held: counts the bytes as they come.

    Raises:
        InvalidRequest: too many media, or as ``MediaFetcher.fetch``.
        RequestTooLarge: an item, or all together, have too many bytes.
        Overloaded: too many bytes are held already.
        DeadlineExceeded.
    """
    wanted = _wanted(request, settings)
    if fetcher is None or not wanted:
        return {}
    check_num_items(request, settings)
    allowance = _Allowance(held, settings.max_body_bytes)
    try:
        async with asyncio.timeout(deadline.remaining()), asyncio.TaskGroup() as group:
            fetches = {url: group.create_task(_fetch(fetcher, url, item, allowance)) for url, item in wanted.items()}
    except BaseExceptionGroup as errors:
        raise cause_of(errors) from None
    except TimeoutError:
        raise DeadlineExceeded("the request's time is used up") from None
    return {url: fetch.result() for url, fetch in fetches.items()}


async def _fetch(fetcher: MediaFetcher, url: str, wanted: _Wanted, allowance: "_Allowance") -> bytes:
    started_at = time.monotonic()
    data = await fetcher.fetch(url, wanted.max_bytes, wanted.param, allowance.take)
    tracing.span("media.fetch", started_at, time.monotonic(), scheme="https", bytes=len(data))
    return data


@dataclass(slots=True)
class _Allowance:
    """What the media of one request may take together: no more than a body that brings them itself."""

    held: HeldBytes
    max_bytes: int
    num_bytes: int = 0

    def take(self, num_bytes: int) -> None:
        """Raises RequestTooLarge, Overloaded."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            metrics.MEDIA_REJECTED.labels("too_large").inc()
            message = f"all media fetched for a request may have at most {self.max_bytes} bytes"
            raise RequestTooLarge(message, param="messages")
        self.held.grow(num_bytes)


def _wanted(request: ChatCompletionRequest, settings: RouterSettings) -> dict[str, _Wanted]:
    found: dict[str, _Wanted] = {}
    for index, message in enumerate(request.messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else []):
            for url, param, max_bytes in _urls(part, f"messages[{index}].content[{place}].{part.type}", settings):
                if url[:6].lower() == "https:":
                    item = found.setdefault(url, _Wanted(param, max_bytes))
                    item.max_bytes = max(item.max_bytes, max_bytes)
    return found


def _urls(part: Part, param: str, settings: RouterSettings) -> Iterator[tuple[str, str, int]]:
    """URLs of a part, where they stand, and what may be behind them."""
    frames, place = part.video, param
    if part.type == "image_url":
        image = part.image_url
        if isinstance(image, str):
            yield image, param, settings.max_item_bytes
        elif isinstance(image, ImageUrl) and image.url is not None:
            yield image.url, f"{param}.url", settings.max_item_bytes
        return
    if part.type == "video_url":
        video = part.video_url
        if isinstance(video, str):
            yield video, param, settings.max_video_bytes
            return
        video = video or VideoUrl()
        if video.url is not None:
            yield video.url, f"{param}.url", settings.max_video_bytes
        frames, place = video.frames, f"{param}.frames"
    if part.type in ("video_url", "video"):
        for index, frame in enumerate(frames or []):
            yield frame, f"{place}[{index}]", settings.max_item_bytes
