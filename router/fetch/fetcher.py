"""The one place where the router asks strangers for something: the bytes behind an ``https:`` URL.

httpcore speaks HTTP and TLS. It is given neither a pool nor an environment: every connection is new, made to an address
that was checked for it, and carries one request without cookies or credentials. Redirects are followed here, each
checked like the first URL. Through a proxy, which looks names up itself, only listed hosts are asked for. Knows nothing
of images and requests.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import httpcore

from common.service import metrics
from common.service.errors import ConfigError, InvalidRequest, MediaFetchFailed, RequestTooLarge
from router.fetch.policy import Blocked, FetchPolicy, Target, parse_domain
from router.fetch.resolver import SystemResolver
from router.media import blocked_url
from router.settings import RouterSettings

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host at a port. Raises OSError."""

_HEADERS: Final = (
    ("Accept", "image/*, video/*, */*;q=0.5"),
    ("Accept-Encoding", "identity"),  # what is counted is what is kept
    ("Connection", "close"),
    ("User-Agent", "dvd-serve"),
)
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_ADDRESSES: Final = 4
"""Tried of one host, each with its share of the time to connect."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of RELIABILITY.md section 5.2.

    Args:
        timeout: seconds of one fetch, from the first look-up to the last byte, redirects included.
        connect_timeout: seconds to look up a name and connect, and again for TLS.
        max_fetches: at a time, and of these from one host.
    """

    timeout: float = 5.0
    connect_timeout: float = 2.0
    max_redirects: int = 3
    max_fetches: int = 32
    max_fetches_per_host: int = 8


class MediaFetcher:
    """Fetches on one event loop.

    Args:
        resolve: how names become addresses.
        tls: whom to believe; default: what the system and certifi believe.
        proxy: ``http://HOST:PORT`` through which everything goes; the environment's never count.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        limits: FetchLimits,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        proxy: str | None = None,
    ) -> None:
        if proxy is not None and not policy.domains:
            raise ConfigError("a proxy needs a list of hosts: nobody here sees what their names stand for")
        self._policy = policy
        self._limits = limits
        self._resolve = resolve or SystemResolver()
        self._tls = tls or httpcore.default_ssl_context()
        self._proxy = proxy
        self._turns = asyncio.Semaphore(limits.max_fetches)
        self._host_turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @classmethod
    def of(cls, settings: RouterSettings) -> "MediaFetcher | None":
        """What the operator allows; nothing by default."""
        if not (settings.allow_media_urls or settings.allowed_media_domains):
            return None
        inside = settings.allow_private_media
        domains = frozenset(parse_domain(entry, may_be_inside=inside) for entry in settings.allowed_media_domains)
        limits = FetchLimits(settings.media_fetch_timeout, max_fetches=settings.max_media_fetches)
        return cls(FetchPolicy(domains, inside), limits, proxy=settings.media_egress_proxy)

    async def fetch(self, url: str, max_bytes: int, param: str, take: Callable[[int], None]) -> bytes:
        """The bytes behind a URL, at least one.

        Args:
            take: called with the size of every piece before it is kept; what it raises ends the fetch.

        Raises:
            InvalidRequest: ``media_url_blocked``, for all causes alike.
            MediaFetchFailed: its server cannot be had, is too slow, or says anything but 200.
            RequestTooLarge: more bytes than allowed.
        """
        try:
            target = self._policy.parse(url)
            # A host that is busy takes no turns from others. Waiting is bounded by the caller's deadline.
            async with self._turn_at(target.host), self._turns:
                with (
                    metrics.MEDIA_FETCHES_INFLIGHT.labels("https").track_inprogress(),
                    metrics.MEDIA_FETCH_SECONDS.labels("https").time(),
                ):
                    async with asyncio.timeout(self._limits.timeout):
                        data = await self._follow(target, _Body(max_bytes, param, take))
        except Blocked as error:
            log.debug("a media URL is blocked: %s", error)
            raise blocked_url(param) from None
        except (TimeoutError, httpcore.TimeoutException):
            raise _rejected("timeout", MediaFetchFailed(_FAILED, param=param)) from None
        except _FAILURES as error:
            log.debug("a media server failed: %s", type(error).__name__)
            raise _rejected("origin", MediaFetchFailed(_FAILED, param=param)) from None
        metrics.MEDIA_BYTES.labels("https").inc(len(data))
        return data

    def _turn_at(self, host: str) -> asyncio.Semaphore:
        turn = self._host_turns.get(host)
        if turn is None:
            turn = self._host_turns[host] = asyncio.Semaphore(self._limits.max_fetches_per_host)
        return turn

    async def _follow(self, target: Target, body: "_Body") -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            answer = await self._ask(target, body)
            if isinstance(answer, bytes):
                return answer
            target = self._policy.follow(target, answer)
        raise _OriginFailed("too many redirects")

    async def _ask(self, target: Target, body: "_Body") -> bytes | str:
        """One request on a connection of its own: the bytes, or where they are said to be."""
        url = httpcore.URL(
            scheme=b"https", host=target.host.encode(), port=target.port, target=target.path.encode("ascii")
        )
        backend, connection = self._connection(url)
        extensions = {"timeout": {"connect": self._limits.connect_timeout}}  # the rest is bounded as a whole
        headers = [("Host", target.authority), *_HEADERS]
        async with (
            aclosing(backend),
            aclosing(connection),
            connection.stream("GET", url, headers=headers, extensions=extensions) as response,
        ):
            location = _header(response, b"location")
            if response.status in _REDIRECTS and location:
                return location
            return await body.read(response)

    def _connection(
        self, url: httpcore.URL
    ) -> tuple["_Backend", httpcore.AsyncHTTPConnection | httpcore.AsyncHTTPProxy]:
        """For one request: whoever connects, and what speaks over it."""
        if self._proxy is None:
            checked = _CheckedBackend(self._policy, self._resolve)
            return checked, httpcore.AsyncHTTPConnection(url.origin, self._tls, network_backend=checked)
        backend = _Backend()
        proxied = httpcore.AsyncHTTPProxy(
            self._proxy, ssl_context=self._tls, max_keepalive_connections=0, network_backend=backend
        )
        return backend, proxied


@dataclass(frozen=True, slots=True)
class _Body:
    """How an answer is read: counted before it is kept."""

    max_bytes: int
    param: str
    take: Callable[[int], None]

    async def read(self, response: httpcore.Response) -> bytes:
        """Raises _OriginFailed, RequestTooLarge, and what ``take`` raises."""
        if response.status != 200 or _header(response, b"content-encoding") not in ("", "identity"):
            raise _OriginFailed("an answer of no use")
        declared = _header(response, b"content-length")
        if declared.isdecimal() and int(declared) > self.max_bytes:  # h11 allows 20 digits
            raise self._too_large()
        pieces: list[bytes] = []
        num_bytes = 0
        async for piece in response.aiter_stream():
            num_bytes += len(piece)
            if num_bytes > self.max_bytes:
                raise self._too_large()
            self.take(len(piece))
            pieces.append(piece)
        if not num_bytes:
            raise _OriginFailed("nothing")
        return b"".join(pieces)

    def _too_large(self) -> InvalidRequest:
        message = f"what is behind this URL may have at most {self.max_bytes} bytes"
        return _rejected("too_large", RequestTooLarge(message, param=self.param))


class _Backend(httpcore.AnyIOBackend):
    """Connects to what it is told, once: to the operator's proxy."""

    def __init__(self) -> None:
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        self._stream = await super().connect_tcp(*arguments, **options)
        return self._stream

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise Blocked("a path")

    async def aclose(self) -> None:
        """httpcore leaves a connection open that is cancelled during its TLS handshake."""
        if self._stream is not None:
            await self._stream.aclose()


class _CheckedBackend(_Backend):
    """Connects to addresses that were looked up and checked for this connection, and to nothing else."""

    def __init__(self, policy: FetchPolicy, resolve: Resolve) -> None:
        super().__init__()
        self._policy = policy
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        async with asyncio.timeout(timeout):
            addresses = await self._resolve(host, port)
            self._policy.check(addresses)
            addresses = addresses[:_MAX_ADDRESSES]
            share = None if timeout is None else timeout / max(1, len(addresses))
            for address in addresses:
                try:
                    return await super().connect_tcp(address, port, share, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout):
                    continue
        raise httpcore.ConnectError("no address answers")


class _OriginFailed(Exception):
    """The other server said something that is no answer."""


_FAILURES: Final = (_OriginFailed, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, OSError)
_FAILED: Final = "the media behind this URL could not be fetched"


def _rejected(reason: str, error: InvalidRequest) -> InvalidRequest:
    metrics.MEDIA_REJECTED.labels(reason).inc()
    return error


def _header(response: httpcore.Response, name: bytes) -> str:
    """Its first value, or nothing."""
    return next((value.decode("utf-8", "replace") for key, value in response.headers if key.lower() == name), "")
