"""The two small interfaces of the feature plane, and what sits behind a receiver.

A vision server holds ``FeatureSender`` objects, one per language server. A language server runs ``FeatureReceiver``
objects, one per transport, all feeding one ``FrameSink``. Frames are ``protos.frame`` headers plus raw payload;
nothing here knows of tensors or requests.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

from typing_extensions import Buffer

from protos.frame import FrameHeader, FrameRejected, checksum, parse_header
from protos.status_pb2 import Endpoint

Lend: TypeAlias = Callable[[], Buffer | None]
"""Memory of a transport, as long as the payload; None: it has none at the moment."""


class FrameSink(Protocol):
    """Where a receiver puts frames: the language server's feature store. Called on the event loop, never blocks."""

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        """Reserved memory for the payload, exactly ``header.payload_bytes`` long and writable.

        Everything that can be known from the header is checked here, before the payload is looked at.

        Args:
            lend: asked once the header has passed every check, for the memory where the payload lies already, or
                will. The sink keeps it as it is, instead of memory of its own, for as long as it needs the features,
                and then lets go of it.

        Raises:
            FrameRejected: reason ``fingerprint``, ``ticket``, ``unsealed``, ``unknown_request``, ``tombstone``,
                ``stale``, ``duplicate``, ``dtype``, ``shape`` or ``size``.
        """
        ...

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        """The payload is in place: check it, open it there if it is sealed, and make its tiles ready.

        Args:
            memory: what ``place`` returned for this very frame; another writer may have begun it again elsewhere.
            payload_crc32c: of ``memory``, computed by the receiver after the last byte was written, on any thread.

        Raises:
            FrameRejected: reason ``checksum``, ``seal`` or ``nonfinite``; also ``tombstone`` if the request ended
                meanwhile, and ``duplicate`` or ``stale`` if another writer was faster.
        """
        ...


class FeatureReceiver(Protocol):
    """Takes frames off one transport."""

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen; returns what senders are told."""
        ...

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        ...


class FeatureSender(Protocol):
    """Brings frames to one receiver. Safe to use from many tasks at once; the order of concurrent sends is free."""

    async def send(self, packed_header: bytes, payload: Buffer, timeout: float) -> None:
        """Send one frame and wait until the receiver has committed it. ``payload`` may be reused afterwards.

        Raises:
            FrameRejected: the receiver refused the frame; its reason is passed on. ``duplicate`` is no error.
            TransportFailed: the peer is gone or does not speak.
            DeadlineExceeded: no acknowledgement within ``timeout`` seconds.
        """
        ...

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        ...


def place_frame(
    sink: FrameSink, packed_header: Buffer, payload_bytes: int, lend: Lend | None = None
) -> tuple[FrameHeader, memoryview]:
    """Where the payload of a frame goes, from its header and the length that the transport was told.

    Raises:
        FrameRejected: the header is none, contradicts that length, or the sink refuses it.
    """
    header = parse_header(packed_header)
    if payload_bytes != header.payload_bytes:
        raise FrameRejected("size", f"payload of {payload_bytes} bytes, header says {header.payload_bytes}")
    return header, sink.place(header, packed_header, lend)


def receive_frame(sink: FrameSink, packed_header: Buffer, payload: Buffer) -> str:
    """Hand one frame to the sink. Returns the verdict for the sender: ``ok``, ``duplicate`` or a rejection's reason."""
    try:
        view = memoryview(payload).cast("B")
        header, memory = place_frame(sink, packed_header, len(view))
        memory[:] = view
        sink.commit(header, memory, checksum(memory))
    except FrameRejected as rejection:
        return rejection.reason
    return "ok"
