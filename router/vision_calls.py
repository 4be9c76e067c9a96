"""One piece of work for the vision tier, given to one server after another until one has done it.

Every call to a vision server goes through here. All of them are idempotent: what a lost server had begun may be done
again elsewhere.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from common.service import metrics
from common.service.errors import DvdError, InternalError, InvalidRequest, Overloaded, Unavailable
from router.fleet import Fleet
from router.workers import VisionWorker

log = logging.getLogger(__name__)

MAX_VISION_ATTEMPTS: Final = 3

ReplyT = TypeVar("ReplyT")


async def call_vision(
    fleet: Fleet,
    image_hash: bytes,
    call: Callable[[VisionWorker, int], Awaitable[ReplyT]],
    *,
    param: str,
    prefer: str | None = None,
) -> ReplyT:
    """What ``call`` returns on the first vision server that does it; a lost, full or failing one is replaced.

    Args:
        image_hash: calls for one image meet on one server, where that is not overloaded.
        call: given a server and the number of attempts before, starting with 0.
        param: where the medium stands in the request; bad input is told with it, and not tried again.
        prefer: address of the server to try first.

    Raises:
        InvalidRequest: the medium cannot be used.
        Unavailable, Overloaded, InternalError: nobody did it; what the last one said.
        DeadlineExceeded: the time is used up.
    """
    tried: set[str] = set()
    failure: DvdError = Unavailable("no vision server is available")
    while len(tried) < MAX_VISION_ATTEMPTS:
        vision = fleet.pick_vision(image_hash, exclude=tried, prefer=prefer)
        if vision is None:
            break
        if tried:
            metrics.DISPATCH_RETRIES.labels("vision", failure.code).inc()
        attempt = len(tried)
        tried.add(vision.address)
        try:
            return await call(vision, attempt)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, code=error.code, param=param) from None
        except (Unavailable, Overloaded, InternalError) as error:
            log.warning("%s was not served by %s: %s", param, vision.name, error.code)
            failure = error
    raise failure
