"""gRPC as our servers use it: one way to make a server, one way to make a channel, one seam where errors become status.

Knows nothing of the services themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, cast

import grpc
import grpc.aio

from common.service import metrics
from common.service.carrier import make_carry_handler
from common.service.carrying import CARRY
from common.service.errors import ConfigError, DvdError, InternalError, PeerRefused, to_grpc
from common.service.leases import Lease, LeasedChannel, Leases, add_leases
from common.service.listen import check_free, is_local
from common.service.roles import Role, may_call, role_name

if TYPE_CHECKING:  # with it comes cryptography, which many programs do without
    from common.service.keys import Keys

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 72 * 2**20
"""A video of 64 MiB with its framing; never unlimited (RELIABILITY.md section 6)."""

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_KEEPALIVE = [*_KEEPALIVE, ("grpc.http2.min_ping_interval_without_data_ms", 5_000), ("grpc.so_reuseport", 0)]
Guard = Literal["keys", "network", "tickets"]
"""``network``: strangers do not reach us, the operator says; ``tickets``: they do, and nothing is taken of them."""

_SSL = b"ssl"
_MAX_NAMES_CHARS = 160


def make_server(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Server:
    """A server whose handlers may raise ``DvdError`` at any point of a call, and cancels those of vanished callers."""
    leases = Leases()
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(leases)],
        options=[*_SERVER_KEEPALIVE, *_message_limits(max_message_bytes)],
    )
    add_leases(server, leases)
    return server


def bind(server: grpc.aio.Server, listen: str, keys: Keys | None = None, *, guard: Guard = "keys") -> str:
    """Listen on ``host:port`` (port 0: any free one) or ``unix:/path``; returns the address to dial.

    Args:
        keys: let in only who has keys of the same deployment, and encrypt.
        guard: what keeps strangers out where other machines can come in; all but "keys" does without ``keys``.

    Raises:
        ConfigError: the address is taken, not ours, or open to others without ``keys``.
    """
    is_open = keys is None and guard != "tickets" and not is_local(listen)
    if is_open and guard == "keys":
        raise ConfigError(
            f"--listen {listen}: other machines reach this address, and whoever does would be obeyed: say --keys DIR"
            " (dvd keys init makes them), or --insecure-network where something else guards the network"
        )
    check_free(listen)  # gRPC would only say that it failed, and take over a socket that somebody listens on
    try:
        port = (
            server.add_insecure_port(listen)
            if keys is None
            else server.add_secure_port(listen, keys.server_credentials())
        )
    except RuntimeError:
        raise ConfigError(f"cannot listen on {listen}: in use, or not an address of this machine") from None
    if is_open:
        log.warning("INSECURE: %s is open to the network without keys or encryption: whoever comes is obeyed", listen)
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def make_channel(
    address: str, keys: Keys | None = None, role: Role | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """One channel per peer, kept for the life of the process. Reconnects quickly: a returning worker is wanted.

    With ``keys`` the peer must have a certificate of the same deployment that names ``role``.
    """
    backoff = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)]
    # Two channels to one address must not share a subchannel: a peer that restarts is a new peer to each.
    isolation = [("grpc.use_local_subchannel_pool", 1)]
    # A proxy of the environment has no business between servers.
    no_proxy = [("grpc.enable_http_proxy", 0)]
    options = [*_KEEPALIVE, *backoff, *isolation, *no_proxy, *_message_limits(max_message_bytes)]
    if keys is None:
        return grpc.aio.insecure_channel(address, options=options)
    assert role is not None  # or any certificate of ours would do
    name = [("grpc.ssl_target_name_override", role_name(role))]
    return grpc.aio.secure_channel(address, keys.channel_credentials(), options=[*options, *name])


def make_leased_channel(
    address: str, keys: Keys | None = None, role: Role | None = None, carried: frozenset[str] = frozenset()
) -> grpc.aio.Channel:
    """A channel for callers whose calls must end when they vanish. Unary requests only, which is all that we have.

    Args:
        carried: methods whose calls share one stream (``protos/carrier.proto``); each answers with a stream.
    """
    calls, renewals = make_channel(address, keys, role), make_channel(address, keys, role)
    return cast(grpc.aio.Channel, LeasedChannel(calls, renewals, carried))


def remaining_seconds(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """What is left of the caller's deadline; None when it set none."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, float(remaining))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns ``DvdError`` into status and metadata, also after the first message of a stream; calls end with the lease
    of their caller."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        lease = self._leases.of(handler_call_details.invocation_metadata)
        if handler_call_details.method == CARRY:
            kind = type(handler_call_details)  # gRPC looks handlers up by none but its own
            return make_carry_handler(lambda *call: continuation(kind(*call)), lease, _check_peer, _ours)
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, lease, name),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, lease, name),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler


def _check_peer(context: grpc.aio.ServicerContext[Any, Any], name: str) -> None:
    """Raises PeerRefused for a call that the caller's certificate is not for. Who needs none was let in by ``bind``."""
    found = context.auth_context()
    if _SSL not in found.get("transport_security_type", ()):
        return
    names = [each.decode("utf-8", "replace") for each in found.get("x509_subject_alternative_name", ())]
    if not may_call(name, names):
        metrics.AUTH_FAILURES.labels("grpc").inc()
        log.warning("refused: %s called %s", ", ".join(names)[:_MAX_NAMES_CHARS] or "somebody without a name", name)
        raise PeerRefused("this certificate is for another role")


def _guard_unary(method: Callable[..., Awaitable[Any]], lease: Lease, name: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check_peer(context, name)
            with lease():
                return await method(request, context)
        except Exception as error:  # noqa: BLE001 - the seam: every failure becomes a status
            await _abort(context, error)

    return guarded


def _guard_stream(
    method: Callable[..., AsyncGenerator[Any, None]], lease: Lease, name: str
) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            _check_peer(context, name)
            # A caller may leave while a message is on its way: what the method holds goes back then, not at some time.
            with lease():
                async with aclosing(method(request, context)) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:  # noqa: BLE001 - the seam: every failure becomes a status
            await _abort(context, error)

    return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    status, details, metadata = to_grpc(_ours(error))
    await context.abort(status, details, metadata)


def _ours(error: Exception) -> DvdError:
    if isinstance(error, BaseExceptionGroup):
        error = _first(error)
    if not isinstance(error, DvdError):
        log.error("unexpected failure in a call", exc_info=error)
        error = InternalError("unexpected failure")
    return error


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    """What a task group failed of: our own error if there is one."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    ours = [error for error in leaves if isinstance(error, DvdError)]
    others = [error for error in leaves if isinstance(error, Exception)]
    return (ours or others or [InternalError("unexpected failure")])[0]


def _message_limits(size: int) -> list[tuple[str, int]]:
    return [("grpc.max_send_message_length", size), ("grpc.max_receive_message_length", size)]


__all__ = [
    "MAX_MESSAGE_BYTES",
    "ErrorInterceptor",
    "bind",
    "make_channel",
    "make_leased_channel",
    "make_server",
    "remaining_seconds",
]
