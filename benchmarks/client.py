"""One request at a time over HTTP: sends a body, times what comes back. Knows nothing of load, phases or statistics.

aiohttp, one connection for each request that is on its way. An idle connection is given up before any server would
close it (uvicorn: after 5 s), so that no request meets one that is just being closed. Foreign errors become a
``Failure`` here.
"""

import asyncio
import io
import time
from types import TracebackType
from typing import Final, Self

import aiohttp
import msgspec
import yarl

from benchmarks.plan import Target
from benchmarks.samples import Failure, Sample
from benchmarks.stream import AnswerStream, describe_error
from common.service.errors import ConfigError, Unavailable

_CONNECT_SECONDS: Final = 30.0
_IDLE_SECONDS: Final = 3.0
_LARGE_BODY_BYTES: Final = 2**18
_MAX_ERROR_BYTES: Final = 2**16
_JSON: Final = {"content-type": "application/json"}


class Client:
    """Talks to one server; use it as an async context manager.

    Raises:
        ConfigError: ``base_url`` is not a URL.
    """

    def __init__(self, target: Target) -> None:
        self._base = _base_url(target.base_url)
        self._url = self._base / "v1/chat/completions"
        self._timeout = target.timeout
        headers = {"accept-encoding": "identity"}
        if target.api_key:
            headers["authorization"] = f"Bearer {target.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS, ttl_dns_cache=None),
            # The whole request has one deadline, in `ask`; a timer of aiohttp's would be touched at every read.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(_CONNECT_SECONDS, target.timeout)),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def model_names(self) -> list[str]:
        """What the server serves.

        Raises:
            Unavailable: it does not answer, or names nothing.
        """
        try:
            async with asyncio.timeout(_CONNECT_SECONDS), self._session.get(self._base / "v1/models") as response:
                body = await response.content.read(_MAX_ERROR_BYTES)
                if response.status != 200:
                    raise Unavailable(f"{self._base}/v1/models: HTTP {response.status}; name the model with --model")
                names = [entry["id"] for entry in msgspec.json.decode(body)["data"]]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else str(error)
            raise Unavailable(f"{self._base}: no server answers: {reason or type(error).__name__}") from None
        except (msgspec.DecodeError, KeyError, TypeError):
            names = []
        if not names:
            raise Unavailable(f"{self._base}/v1/models names no model; name it with --model")
        return names

    async def ask(self, body: bytes, sample: Sample) -> None:
        """Send ``body`` now and fill in ``sample`` until the answer has ended. Raises nothing but a cancellation."""
        answer = AnswerStream(sample)
        sample.sent_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                failure = await self._exchange(body, answer)
        except TimeoutError as error:
            is_connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            failure = Failure("connect", "timeout") if is_connecting else Failure("timeout")
        except (aiohttp.ClientPayloadError, aiohttp.http_exceptions.HttpProcessingError) as error:
            failure = Failure("protocol", "cut", str(error)[:200])
        except (aiohttp.ClientConnectionError, OSError) as error:
            lost = Failure("connect", type(error).__name__, str(error)[:200])
            failure = lost if sample.first_at is None else Failure("protocol", "cut", str(error)[:200])
        except aiohttp.ClientError as error:
            failure = Failure("protocol", type(error).__name__, str(error)[:200])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            failure = Failure("protocol", "not a chunk", str(error)[:200])
        ending = answer.finish()
        # A server may drop the connection once all is said.
        sample.failure = ending if answer.is_done else failure or ending
        if sample.failure is not None or not sample.ended_at:
            sample.ended_at = time.perf_counter()

    async def _exchange(self, body: bytes, answer: AnswerStream) -> Failure | None:
        # Large bodies are written in pieces, so that other streams are read in between.
        data = io.BytesIO(body) if len(body) > _LARGE_BODY_BYTES else body
        async with self._session.post(self._url, data=data, headers=_JSON, allow_redirects=False) as response:
            if response.status != 200:
                code, message = describe_error(await response.content.read(_MAX_ERROR_BYTES))
                return Failure("http_status", f"{response.status} {code}".rstrip(), message)
            async for piece in response.content.iter_any():
                answer.feed(piece, time.perf_counter())
        return None


def _base_url(text: str) -> yarl.URL:
    """Without the ``/v1`` that OpenAI's own client wants. Raises ConfigError."""
    try:
        url = yarl.URL(text.rstrip("/").removesuffix("/v1"))
    except ValueError:
        url = yarl.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url {text[:64]}: expected http://HOST:PORT")
    return url
