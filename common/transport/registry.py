"""The transports by name. A module is loaded when its transport is first used: not every machine has all libraries.

Each module has a ``receiver_at(listen, limits)``, where ``listen`` is ``host:port`` (port 0: any free one) or
``unix-dir:/path`` for a socket in a directory that only this user may enter (made if missing), and a
``sender_to(address, limits)`` for the address of an ``Endpoint`` of its kind.
"""

import importlib
from typing import Any, Final, Literal, get_args

from common.service.errors import ConfigError
from common.transport.base import FeatureReceiver
from common.transport.sender import BoundedSender, TransportLimits

TransportName = Literal["zmq", "grpc"]
TRANSPORTS: Final[tuple[TransportName, ...]] = get_args(TransportName)
"""Best first."""


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


def _module(transport: str) -> Any:
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport {transport!r}: must be one of {', '.join(TRANSPORTS)}")
    return importlib.import_module(f"common.transport.{transport}")
