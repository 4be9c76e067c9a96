"""What both ends of ``Carrier.Carry`` agree on (``protos/carrier.proto``)."""

from collections.abc import Iterable
from typing import Final

import grpc

from protos.carrier_pb2 import Metadatum

CARRY: Final = "/dvd.v1.Carrier/Carry"
WINDOW: Final = 256
"""Messages of one call that may be on their way or unread; its server waits then, as it would for a slow connection."""
MAX_CARRIED_BYTES: Final = 2**20
"""Of one message of the stream, or little more: nobody's token waits behind megabytes. Larger requests go alone."""
MAX_TIMEOUT_SECONDS: Final = 86_400.0
"""No request lasts for a day; what is no number, or none that a timer takes, is refused with it."""
STATUSES: Final = {status.value[0]: status for status in grpc.StatusCode}


def pack_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> list[Metadatum]:
    """Text only, which is all that ours are."""
    return [Metadatum(key=key, value=value) for key, value in metadata if isinstance(value, str)]


def unpack_metadata(metadata: Iterable[Metadatum]) -> tuple[tuple[str, str], ...]:
    return tuple((each.key, each.value) for each in metadata)
