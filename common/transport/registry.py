"""The transports by name. A module is loaded when its transport is first used: not every machine has all libraries.

Each module has a ``receiver_at(listen, limits)``, where ``listen`` is ``host:port`` (port 0: any free one) or
``unix-dir:/path`` for a socket in a directory that only this user may enter (made if missing), and a
``sender_to(address, limits)`` for the address of an ``Endpoint`` of its kind. A module may also have

* ``why_unavailable()``: what this machine lacks for it, "" if nothing; or it raises ConfigError when loaded;
* ``why_not_auto()``: why ``auto`` leaves it out although it could be had, "" if it does not;
* ``can_reach(address)``: whether a sender here may try that endpoint at all, by looking at the address only;
* ``TAKES_PORT``: False if it ignores the port of ``listen``.
"""

import functools
import importlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, get_args

from common.service.errors import ConfigError
from common.transport.base import FeatureReceiver
from common.transport.listen import nth_port
from common.transport.sender import BoundedSender, TransportLimits
from protos.status_pb2 import Endpoint

log = logging.getLogger(__name__)

TransportName = Literal["shm", "nixl", "tcp", "zmq", "grpc"]
TRANSPORTS: Final[tuple[TransportName, ...]] = get_args(TransportName)
"""Best first. ``auto`` leaves out ``nixl``: whether its network is isolated only the operator knows."""
TransportChoice = Literal["auto", TransportName]
"""What settings may say; ``auto`` stands for all that are not named beside it."""


def choose_transports(choices: Iterable[TransportChoice]) -> tuple[TransportName, ...]:
    """The transports that ``choices`` mean on this machine, best first.

    Raises:
        ConfigError: none is named, or one that is named is unknown or cannot be had here.
    """
    named = tuple(choices)
    chosen: list[TransportName] = []
    for choice in named:
        if choice == "auto":
            chosen += [transport for transport in _automatic() if transport not in named]
            continue
        _check_name(choice)
        if reason := why_unavailable(choice):
            raise ConfigError(f"transport {choice!r}: {reason}")
        chosen.append(choice)
    if not chosen:
        raise ConfigError(f"transports: none named; must be auto or some of {', '.join(TRANSPORTS)}")
    return tuple(dict.fromkeys(chosen))


@functools.cache
def why_unavailable(transport: TransportName) -> str:
    """What this machine lacks for a transport, in words; "" if it can be had."""
    try:
        module = _module(transport)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except ConfigError as error:
        return error.message
    return str(getattr(module, "why_unavailable", lambda: "")())


def can_reach(endpoint: Endpoint) -> bool:
    """Whether a sender on this machine may try ``endpoint``: False only for what cannot work. Connects to nothing."""
    check = getattr(_module(endpoint.transport), "can_reach", None)
    return check is None or bool(check(endpoint.address))


def make_receivers(
    transports: Sequence[TransportName], listen: str, limits: TransportLimits | None = None
) -> list[FeatureReceiver]:
    """A receiver for each. Those that need a port take the next ones from that of ``listen`` on.

    Raises:
        ConfigError: see ``make_receiver``.
    """
    receivers, num_ports = [], 0
    for transport in transports:
        receivers.append(make_receiver(transport, nth_port(listen, num_ports), limits=limits))
        num_ports += getattr(_module(transport), "TAKES_PORT", True)
    return receivers


def make_receiver(transport: str, listen: str, *, limits: TransportLimits | None = None) -> FeatureReceiver:
    """A receiver for ``transport`` at ``listen``.

    Raises:
        ConfigError: unknown transport, an address that senders cannot dial, or a directory open to others.
    """
    receiver: FeatureReceiver = _module(transport).receiver_at(listen, limits or TransportLimits())
    return receiver


def make_sender(transport: str, address: str, limits: TransportLimits) -> BoundedSender:
    """A sender to one endpoint; connects when it first sends. Raises ConfigError for an unknown transport."""
    sender: BoundedSender = _module(transport).sender_to(address, limits)
    return sender


@functools.cache
def _automatic() -> tuple[TransportName, ...]:
    """What ``auto`` is on this machine."""
    found = []
    for transport in TRANSPORTS:
        if reason := _why_not_auto(transport):  # as always: no news
            log.debug("features do not travel over %s: %s", transport, reason)
        elif reason := why_unavailable(transport):
            log.info("features do not travel over %s: %s", transport, reason)
        else:
            found.append(transport)
    return tuple(found)


def _why_not_auto(transport: TransportName) -> str:
    try:
        module = _module(transport)
    except (ModuleNotFoundError, ConfigError):
        return ""
    return str(getattr(module, "why_not_auto", lambda: "")())


def _check_name(transport: str) -> None:
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport {transport!r}: must be one of {', '.join(TRANSPORTS)}")


def _module(transport: str) -> Any:
    _check_name(transport)
    return importlib.import_module(f"common.transport.{transport}")
