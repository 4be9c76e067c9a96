"""``GET /health/deep``: one tiny image and one token through both tiers, seldom, however often it is asked for."""

import asyncio
import base64
import io
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from PIL import Image
from starlette.types import Receive, Scope, Send

from common.service.errors import DvdError, InternalError, InvalidRequest, Unavailable
from protos.language_pb2 import Finished, Token
from router.admission import Admission, Slot
from router.api.exchange import Exchange, as_dvd_error
from router.api.messages import read_messages
from router.api.named_media import NamedMedia
from router.api.schemas import ChatCompletionRequest
from router.api.translate import Origin, translate
from router.fleet import Fleet
from router.pipeline import Pipeline
from router.record import Deadline, RequestRecord
from router.settings import RouterSettings

RESULT_SECONDS: Final = 10.0
"""A result is as good as new for so long; no two checks begin within it."""
TIMEOUT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Result:
    """Of one check: stage times, or what went wrong."""

    at: float  # monotonic
    metrics: dict[str, Any] | None = None
    error: DvdError | None = None


class DeepHealth:
    """An ASGI application for one route. Raises what the check failed of, never as the client's fault.

    Args:
        refusal: why nothing can be checked now, such as while draining; None: it can.
    """

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        settings: RouterSettings,
        refusal: Callable[[], DvdError | None],
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._settings = settings
        self._refusal = refusal
        self._pipeline = Pipeline(fleet)
        self._latest: _Result | None = None
        self._checking = asyncio.Lock()
        self._image = _tiny_image()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        async with self._checking:  # whoever comes meanwhile has the same result
            if self._latest is None or time.monotonic() - self._latest.at >= RESULT_SECONDS:
                self._latest = await self._check()
            result = self._latest
        if result.error is not None:
            raise result.error.with_traceback(None)
        seconds_ago = round(time.monotonic() - result.at, 3)
        await Exchange.of(scope).respond_json(
            {"status": "ok", "seconds_ago": seconds_ago, "metrics": result.metrics},
            headers={"cache-control": "no-store"},
        )

    async def _check(self) -> _Result:
        record = RequestRecord(f"health-{secrets.token_hex(16)}", kind="image", num_images=1, num_tiles=1)
        try:
            await self._ask(record)
        except Exception as error:  # noqa: BLE001 - a check that fails is a result
            return _Result(time.monotonic(), error=_not_the_clients(as_dvd_error(error)))
        return _Result(time.monotonic(), metrics=record.metrics_block())

    async def _ask(self, record: RequestRecord) -> None:
        model = self._fleet.model
        if model is None:
            raise Unavailable("no server has said yet what it serves")
        deadline = Deadline.after(min(TIMEOUT_SECONDS, self._settings.request_timeout))
        with self._admission.enter("image", deadline.remaining()) as slot:
            body = _body(self._image)
            messages = read_messages(body, model, self._settings, NamedMedia(0).of(""))
            origin = Origin(request_id=secrets.token_bytes(16), tenant="", deadline=deadline)
            request = translate(body, messages, origin, model, self._settings)
            slot.weigh(request.num_prompt_tokens, record.num_tiles)
            await self._pipeline.run(request, _Unread(slot), record)


class _Unread:
    """An answer that nobody reads."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    async def on_token(self, token: Token, is_more_ready: bool) -> None:
        self._slot.first_token()

    async def on_finished(self, finished: Finished) -> None:
        self._slot.first_token()


def _body(image: str) -> ChatCompletionRequest:
    # The salt makes it an image that no cache knows, so that the vision tier has to do its part.
    return msgspec.convert(
        {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}],
            "max_tokens": 1,
            "max_dynamic_patch": 1,
            "temperature": 0,
            "cache_salt": secrets.token_hex(16),
        },
        ChatCompletionRequest,
    )


def _tiny_image() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "gray").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _not_the_clients(error: DvdError) -> DvdError:
    """Whoever asks for health has done nothing wrong."""
    if isinstance(error, InvalidRequest):
        return InternalError(f"the check was refused: {error.message}")
    return error
