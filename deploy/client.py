"""A small client of the chat API, for all that asks from here. Knows one endpoint, its stream and its errors."""

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import httpx

from common.service.errors import (
    AuthenticationFailed,
    ConfigError,
    DeadlineExceeded,
    DvdError,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    MediaFetchFailed,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestReadTimeout,
    RequestTooLarge,
    Unavailable,
)
from deploy.images import ImageSource, image_url

_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 600.0
_DATA = "data: "
_DONE = "[DONE]"
_OVERLOADED: Final = frozenset({Overloaded.type, "rate_limit_error"})
_TOO_MANY_REQUESTS: Final = 429
_KINDS: Final = (
    InvalidRequest, NotFound, MethodNotAllowed, RequestTooLarge, HeadersTooLarge, RequestReadTimeout, MediaFetchFailed,
    AuthenticationFailed, InternalError, Unavailable, DeadlineExceeded,
)  # fmt: skip
_BY_STATUS: Final[Mapping[int, type[DvdError]]] = {kind.http_status: kind for kind in _KINDS}
_BY_CODE: Final[Mapping[str, type[DvdError]]] = {kind.default_code: kind for kind in _KINDS}

Message = dict[str, Any]


class Thought(str):
    """A piece of an answer that is not part of its text: what the model thinks before it."""

    __slots__ = ()


@dataclass(slots=True)
class Answer:
    """What one request was answered. Empty unless asked for: ``metrics`` from a server that runs with
    ``--enable-per-request-metrics``, ``usage`` with ``stream_options={"include_usage": True}``; ``reasoning`` from a
    model that does not think first."""

    text: str = ""
    finish_reason: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    reasoning: str = ""


class ChatClient:
    """Talks to one server.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: sent as bearer token when not empty.
        timeout: seconds without a sign of life after which an answer is given up.

    Raises:
        ConfigError: not a URL.
    """

    def __init__(self, url: str, api_key: str = "", timeout: float = _REQUEST_SECONDS) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Timeout(timeout, connect=_CONNECT_SECONDS)
        try:
            self._http = httpx.Client(
                base_url=url,
                headers=headers,
                timeout=limits,
                limits=httpx.Limits(max_connections=None),  # how much is asked at once is up to the caller
                trust_env=False,  # no proxy of the environment between a terminal and its own machine
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"url {url}: {error}") from None
        if self._http.base_url.scheme not in ("http", "https"):
            raise ConfigError(f"url {url}: expected http://HOST:PORT")
        self.last: Answer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Served model names.

        Raises:
            Unavailable: nobody answers, or somebody else.
        """
        with _seam():
            response = self._http.get("/v1/models")
        _raise_for_status(response)
        try:
            return [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise Unavailable("what answers there is no OpenAI-compatible server") from None

    def stream(self, messages: Sequence[Message], **options: Any) -> Generator[str]:
        """Pieces of the answer as they arrive, those of its reasoning as ``Thought``; afterwards ``last`` holds the
        whole. Close the iterator to cancel.

        Raises:
            InvalidRequest: the server refused the request.
            Unavailable: it cannot be reached, or failed midway.
        """
        self.last = None
        answer = Answer()
        yield from self.stream_into(answer, messages, **options)
        self.last = answer

    def stream_into(self, answer: Answer, messages: Sequence[Message], **options: Any) -> Generator[str]:
        """``stream`` for several threads at once: ``answer`` is filled as it comes."""
        body = {"messages": list(messages), "stream": True, **options}
        with _seam(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            _raise_for_status(response)
            for event in _events(response.iter_lines()):
                yield from _take(event, answer)


def user_message(text: str, images: Sequence[ImageSource] = ()) -> Message:
    """A user's turn, images first.

    Raises:
        InvalidRequest: an image cannot be read.
    """
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@contextlib.contextmanager
def _seam() -> Iterator[None]:
    """httpx's errors become ours here."""
    try:
        yield
    except httpx.ConnectError as error:
        raise Unavailable(f"no server answers: {error}") from None
    except httpx.HTTPError as error:
        raise Unavailable(f"the connection to the server failed: {error or type(error).__name__}") from None


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith(_DATA) or line == _DATA + _DONE:
            continue
        event: dict[str, Any] = json.loads(line.removeprefix(_DATA))
        if "error" in event:
            raise _as_error(event)
        yield event


def _take(event: dict[str, Any], answer: Answer) -> list[str]:
    """Note what one chunk says; returns its pieces."""
    answer.metrics = event.get("metrics") or answer.metrics
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices") or ():
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        delta = choice["delta"]
        thought = Thought(delta.get("reasoning_content") or delta.get("reasoning") or "")
        text = str(delta.get("content") or "")
        answer.reasoning += thought
        answer.text += text
        return [piece for piece in (thought, text) if piece]
    return []


def thinking_option(thinking: bool) -> dict[str, Any]:
    """The field of a request that asks for thoughts before the answer, or for none."""
    return {"chat_template_kwargs": {"enable_thinking": thinking}}


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        body = response.json()
    except ValueError:
        body = None
    raise _as_error(body, response)


def _as_error(body: Any, response: httpx.Response | None = None) -> DvdError:
    """The error a server tells of, in a body or (without response) inside a stream; API.md section 5."""
    told = body.get("error") if isinstance(body, dict) else None
    told = told if isinstance(told, dict) else {}
    message, code, param = (_text(told.get(name)) for name in ("message", "code", "param"))
    if not message:
        message = "the server failed" if response is None else f"HTTP {response.status_code}"
    kind = _kind_of(_text(told.get("type")), code, None if response is None else response.status_code)
    return kind(message, code=code, param=param, retry_after=None if response is None else _retry_after(response))


def _kind_of(told: str | None, code: str | None, status: int | None) -> type[DvdError]:
    if told in _OVERLOADED or status == _TOO_MANY_REQUESTS:
        return Overloaded
    if status is None:
        return _BY_CODE.get(code or "", InvalidRequest if told == InvalidRequest.type else Unavailable)
    return _BY_STATUS.get(status, InvalidRequest if 400 <= status < 500 else Unavailable)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; None where nothing readable is said."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(response.headers[name]) * scale)
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
