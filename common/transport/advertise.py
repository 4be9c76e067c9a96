"""What senders are told to dial, where that is not what was bound: behind NAT, in a container, before a proxy."""

import re
from typing import Final

from protos.status_pb2 import Endpoint

_HOST_PORT: Final = re.compile(r"(?P<scheme>(tcp://)?)(?P<host>\[[^\]]+\]|[^/:]+):(?P<port>\d+)")


def advertised(endpoint: Endpoint, host: str | None) -> Endpoint:
    """``endpoint`` with another host in its ``host:port``; sockets of this machine stay as they are."""
    match = _HOST_PORT.fullmatch(endpoint.address)
    if host is None or match is None:
        return endpoint
    return Endpoint(transport=endpoint.transport, address=f"{match['scheme']}{host}:{match['port']}")
