"""The one exception tree, and its two seams out: gRPC status and HTTP.

    DvdError
    ├── InvalidRequest            the client must change the request
    │   ├── NotFound              ... ask for something that exists
    │   ├── MethodNotAllowed
    │   ├── RequestTooLarge       ... send less
    │   │   └── HeadersTooLarge
    │   ├── RequestReadTimeout    ... send it faster
    │   └── MediaFetchFailed      ... name media that can be read
    ├── AuthenticationFailed      the client must bring a key
    ├── Overloaded                the client may come again later
    ├── RateLimited               ... when its tenant's quota has something left
    ├── Unavailable               a part of the system is missing for now; another server may do
    │   └── TransportFailed       ... the way to one peer is broken
    ├── DeadlineExceeded          the time is used up
    ├── Cancelled                 the caller has left; nobody reads the answer
    ├── InternalError             our bug
    │   └── PeerRefused           ... or that of a program of ours which asks for what it may not
    └── StartupError              the operator must change something; never reaches a client
        ├── ConfigError           ... an option
        └── CheckpointError       ... the model's files

Foreign errors become ours where the foreign library is called. Messages are read by strangers: no addresses, paths,
host names or tracebacks, at most 64 characters of a bad value (API.md section 5).
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import grpc

MAX_MESSAGE_CHARS = 512
_CODE_KEY = "dvd-code"
_PARAM_KEY = "dvd-param"
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")
"""gRPC takes no such metadata, and would say INTERNAL instead of all."""


class DvdError(Exception):
    """Base of all errors this project raises on purpose.

    Args:
        message: for the one who caused it; cut to 512 characters.
        code: one of API.md section 5; the class has a default.
        param: path of the offending field, such as ``messages[0].content[1].image_url.url``.
        retry_after: seconds a client should wait, where waiting helps.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    should_retry: ClassVar[bool] = False

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARS])
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidRequest(DvdError):
    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    type = "invalid_request_error"
    default_code = "invalid_value"


class NotFound(InvalidRequest):
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    default_code = "not_found"


class MethodNotAllowed(InvalidRequest):
    http_status = 405
    default_code = "method_not_allowed"


class RequestTooLarge(InvalidRequest):
    http_status = 413
    default_code = "request_too_large"


class HeadersTooLarge(RequestTooLarge):
    http_status = 431
    default_code = "headers_too_large"


class RequestReadTimeout(InvalidRequest):
    http_status = 408
    default_code = "request_read_timeout"


class MediaFetchFailed(InvalidRequest):
    http_status = 422
    default_code = "media_fetch_failed"


class AuthenticationFailed(DvdError):
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    type = "authentication_error"
    default_code = "invalid_api_key"


class Overloaded(DvdError):
    http_status = 503
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    type = "overloaded_error"
    default_code = "overloaded"
    should_retry = True


class RateLimited(DvdError):
    """A tenant's quota is used up.

    Args:
        reason: which limit, out of a closed set.
    """

    http_status = 429
    grpc_status = grpc.StatusCode.ABORTED  # RESOURCE_EXHAUSTED says that a server is full
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    should_retry = True

    def __init__(
        self,
        message: str,
        *,
        reason: str = "requests",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, retry_after=retry_after)
        self.reason = reason


class Unavailable(DvdError):
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    default_code = "worker_unavailable"
    should_retry = True


class TransportFailed(Unavailable):
    """Feature frames do not get through to one peer."""

    default_code = "transport_failed"


class DeadlineExceeded(DvdError):
    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    default_code = "timeout"


class Cancelled(DvdError):
    http_status = 499
    grpc_status = grpc.StatusCode.CANCELLED
    default_code = "cancelled"


class InternalError(DvdError):
    """Something that must not happen did."""


class PeerRefused(InternalError):
    """A program of ours asks for what its certificate is not for."""

    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    default_code = "peer_refused"


class StartupError(DvdError):
    """A server cannot start as asked."""


class ConfigError(StartupError):
    default_code = "invalid_config"


class CheckpointError(StartupError):
    default_code = "invalid_checkpoint"


_FROM_GRPC: Mapping[grpc.StatusCode, type[DvdError]] = {
    kind.grpc_status: kind
    for kind in (
        InvalidRequest, NotFound, AuthenticationFailed, Overloaded, RateLimited, Unavailable, DeadlineExceeded,
        Cancelled, PeerRefused, InternalError,
    )
}  # fmt: skip


def to_grpc(error: DvdError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Status, details and trailing metadata that ``from_grpc`` turns back into the same error."""
    metadata = [(_CODE_KEY, error.code)]
    if error.param is not None:
        metadata.append((_PARAM_KEY, _UNPRINTABLE.sub("?", error.param[:MAX_MESSAGE_CHARS])))
    return error.grpc_status, error.message, tuple(metadata)


def from_grpc(error: grpc.RpcError) -> DvdError:
    """The error a worker raised, or what gRPC itself says of the connection. Never carries an address."""
    status = error.code()
    metadata: dict[str, str | bytes] = dict(error.trailing_metadata() or ())
    if _CODE_KEY in metadata:
        kind = _FROM_GRPC.get(status, InternalError)
        return kind(error.details() or "", code=_text(metadata[_CODE_KEY]), param=_text(metadata.get(_PARAM_KEY)))
    if status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return _FROM_GRPC[status](f"call ended with {status.name}")
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Unavailable("a server of ours cannot be reached")
    return InternalError(f"call ended with {status.name}")


def was_raised_by_us(error: grpc.RpcError) -> bool:
    """Whether a worker raised it; else gRPC says it of the connection."""
    return _CODE_KEY in dict(error.trailing_metadata() or ())


def to_http(error: DvdError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, OpenAI-shaped body and headers (API.md section 5)."""
    body = {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    headers = {"x-should-retry": "true" if error.should_retry else "false"}
    if error.retry_after is not None or error.should_retry:
        seconds = 1.0 if error.retry_after is None else error.retry_after
        headers["retry-after"] = str(max(1, round(seconds)))
        headers["retry-after-ms"] = str(round(seconds * 1000))
    if isinstance(error, AuthenticationFailed):
        headers["www-authenticate"] = "Bearer"
    return error.http_status, body, headers


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
