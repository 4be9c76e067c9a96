"""A relay between the two ends of the ``shm`` transport: forwards messages and descriptors, damages shared memory.

Does what ``fakes.Relay`` does for byte streams.
"""

import asyncio
import mmap
import os
import secrets
import socket
from dataclasses import dataclass, field

from common.transport import packets, shm
from common.transport.packets import PacketLink
from common.transport.shm_messages import FRAME, FRAME_KIND, MAX_MESSAGE_BYTES
from protos.status_pb2 import Endpoint


@dataclass(eq=False)
class _Pair:
    links: list[PacketLink] = field(default_factory=list)
    segments: dict[int, mmap.mmap] = field(default_factory=dict)

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.segments.clear()


class ShmRelay:
    """Stands between senders and a receiver."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._target = endpoint.address.rpartition("/")[2]
        self._name = f"relay-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = None
        self._pairs: list[_Pair] = []
        self._is_paused = False
        self._flip_at: int | None = None
        self._cut_at: int | None = None
        self.num_connections = 0
        self.num_forwarded = 0  # bytes to the receiver, those in segments included

    async def start(self) -> Endpoint:
        self._listener = packets.listen(self._name)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        return Endpoint(transport=shm.NAME, address=shm.address_of(self._name))

    def pause(self) -> None:
        """Forward nothing in either direction; the connections stay up."""
        self._is_paused = True
        for link in self._links():
            link.pause_reading()

    def resume(self) -> None:
        self._is_paused = False
        for link in self._links():
            link.resume_reading()

    def flip_a_bit_after(self, num_bytes: int) -> None:
        """In what is forwarded from now on, once."""
        self._flip_at = self.num_forwarded + num_bytes

    def cut_after(self, num_bytes: int) -> None:
        """Break the connections within what is forwarded from now on, once."""
        self._cut_at = self.num_forwarded + num_bytes

    async def close(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for pair in self._pairs:
            pair.close()

    def _links(self) -> list[PacketLink]:
        return [link for pair in self._pairs for link in pair.links]

    def _accept(self, listener: socket.socket) -> None:
        self.num_connections += 1
        here, _ = listener.accept()
        try:
            there = packets.connect(self._target)
        except OSError:
            here.close()
            return
        pair = _Pair()
        self._pairs.append(pair)
        for connection, on_message in ((here, self._to_receiver), (there, self._to_sender)):

            def forward(message: memoryview, descriptor: int, on_message=on_message) -> None:
                on_message(pair, message, descriptor)

            pair.links.append(
                PacketLink(
                    connection,
                    max_message_bytes=MAX_MESSAGE_BYTES,
                    max_queued=10_000,
                    on_message=forward,
                    on_end=lambda cause: pair.close(),
                )
            )
            if self._is_paused:
                pair.links[-1].pause_reading()

    def _to_sender(self, pair: _Pair, message: memoryview, descriptor: int) -> None:
        pair.links[0].send(message, descriptor=descriptor)

    def _to_receiver(self, pair: _Pair, message: memoryview, descriptor: int) -> None:
        message = payload = memoryview(bytearray(message))
        num_bytes = len(message)
        if message[0] == FRAME_KIND and (segment := FRAME.unpack_from(message)[2]):
            if descriptor >= 0:
                pair.segments[segment] = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            payload = memoryview(pair.segments[segment])
            num_bytes += FRAME.unpack_from(message)[4]
        if self._cut_at is not None and self._cut_at < self.num_forwarded + num_bytes:
            self._cut_at = None
            for each in self._pairs:
                each.close()
            if descriptor >= 0:
                os.close(descriptor)
            return
        if self._flip_at is not None and self._flip_at < self.num_forwarded + num_bytes:
            payload[min(self._flip_at - self.num_forwarded, len(payload) - 1)] ^= 1
            self._flip_at = None
        self.num_forwarded += num_bytes
        pair.links[1].send(message, descriptor=descriptor)
