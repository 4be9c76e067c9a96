"""Where the bare subjects of ``benchmarks.transport`` arrive: a process that prints its port, and ends with its input.

python -m benchmarks.transport_peer "raw socket"
"""

import argparse
import asyncio
import socket
import struct
import sys
import threading
from typing import Final

import zmq
import zmq.asyncio

from common.service.heap import keep_freed_memory

RAW: Final = "raw socket"
BARE_ZMQ: Final = "zmq, bare"
TICKET: Final = bytes(32)
"""What frames are signed with."""
BATCH: Final = struct.Struct("<QQ")
"""Before a batch of a bare subject: bytes of a message, messages. One byte comes back when all of them are here."""
DONE: Final = b"\1"


def receive_raw() -> None:
    """A blocking ``recv_into`` of one connection, always into the same memory."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connected, _ = listener.accept()
    with connected:
        memory = memoryview(bytearray())
        while batch := connected.recv(BATCH.size, socket.MSG_WAITALL):
            num_bytes, num_messages = BATCH.unpack(batch)
            if num_bytes != len(memory):
                memory = memoryview(bytearray(num_bytes))
            for _ in range(num_messages):
                _receive_into(connected, memory)
            connected.sendall(DONE)


def _receive_into(connected: socket.socket, memory: memoryview) -> None:
    while memory:
        num_bytes = connected.recv_into(memory)
        if not num_bytes:
            raise ConnectionError("the other side has left")
        memory = memory[num_bytes:]


async def receive_bare_zmq() -> None:
    """The sockets of our transport, and nothing else."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        print(port, flush=True)
        serving = asyncio.create_task(_serve_bare(peer))
        await asyncio.to_thread(sys.stdin.read)
        serving.cancel()
        await asyncio.wait({serving})


async def _serve_bare(peer: zmq.asyncio.Socket) -> None:
    while True:
        identity, batch = await peer.recv_multipart()
        for _ in range(BATCH.unpack(batch)[1]):
            await peer.recv_multipart(copy=False)
        await peer.send_multipart([identity, DONE])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport_peer", description=__doc__)
    parser.add_argument("subject", choices=(RAW, BARE_ZMQ))
    subject = parser.parse_args().subject
    keep_freed_memory()  # as our servers do
    if subject == RAW:
        threading.Thread(target=receive_raw, daemon=True).start()
        sys.stdin.read()
    else:
        asyncio.run(receive_bare_zmq())


if __name__ == "__main__":
    main()
