"""A small client of the chat API, shared by ``dvd chat`` and ``dvd demo``. Knows one endpoint and its stream format."""

import base64
import contextlib
import json
import mimetypes
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from common.service.errors import ConfigError, DvdError, InvalidRequest, Unavailable

_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 600.0
_DATA = "data: "
_DONE = "[DONE]"

Message = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """A finished answer. ``metrics`` is empty unless the server runs with ``--enable-per-request-metrics``."""

    text: str
    finish_reason: str | None
    metrics: dict[str, Any]


class ChatClient:
    """Talks to one server.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: sent as bearer token when not empty.

    Raises:
        ConfigError: not a URL.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(_REQUEST_SECONDS, connect=_CONNECT_SECONDS)
        try:
            # No proxy of the environment between a terminal and its own machine.
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
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
        """Served model names."""
        with _seam():
            response = self._http.get("/v1/models")
        _raise_for_status(response)
        return [entry["id"] for entry in response.json()["data"]]

    def stream(self, messages: Sequence[Message], **options: Any) -> Generator[str]:
        """Pieces of the answer as they arrive; afterwards ``last`` holds the whole. Close the iterator to cancel.

        Raises:
            InvalidRequest: the server refused the request.
            Unavailable: it cannot be reached, or failed midway.
        """
        self.last = None
        answer = Answer("", None, {})
        body = {"messages": list(messages), "stream": True, **options}
        with _seam(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            _raise_for_status(response)
            for event in _events(response.iter_lines()):
                text = _take(event, answer)
                if text:
                    yield text
        self.last = answer


def user_message(text: str, images: Sequence[Path] = ()) -> Message:
    """A user's turn, images first."""
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def data_url(image: Path) -> str:
    """The file's bytes as they are; the server judges them.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        content = image.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{image}: {error.strerror}") from None
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


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
            raise Unavailable(event["error"]["message"], code=event["error"]["code"])
        yield event


def _take(event: dict[str, Any], answer: Answer) -> str:
    """Note what one chunk says; returns its text."""
    answer.metrics = event.get("metrics") or answer.metrics
    for choice in event.get("choices") or ():
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        text = choice["delta"].get("content") or ""
        answer.text += text
        return str(text)
    return ""


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    kind: type[DvdError] = InvalidRequest if response.is_client_error else Unavailable
    raise kind(message)
