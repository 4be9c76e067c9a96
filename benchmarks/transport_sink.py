"""Where the transports of ``benchmarks.transport`` arrive: a process that prints its address, and ends with its input.

python -m benchmarks.transport_sink tcp 127.0.0.1:0
"""

import argparse
import asyncio
import sys
from typing import Final

import torch
from typing_extensions import Buffer

from benchmarks.transport_peer import TICKET
from common.service.heap import freeze_heap, keep_freed_memory
from common.transport.base import Lend
from common.transport.registry import make_receiver
from protos.frame import FrameHeader, FrameRejected, is_signed_by
from protos.seal import open_payload

_MAX_SAMPLES: Final = 4096


class Sink:
    """Does to a frame what the feature store does, less the reservation; then lets go of it, as if it were used."""

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        if not is_signed_by(packed_header, TICKET):
            raise FrameRejected("ticket", "not ours")
        memory = None if lend is None else lend()
        if memory is not None:
            rows = torch.frombuffer(memory, dtype=torch.bfloat16)
        else:
            rows = torch.empty(header.num_tokens * header.hidden_size, dtype=torch.bfloat16)
        return rows.view(torch.uint8).numpy().data

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        if header.seal is not None:
            open_payload(header, memory, TICKET)
        elif payload_crc32c != header.payload_crc32c:
            raise FrameRejected("checksum", "damaged")
        values = torch.frombuffer(memory, dtype=torch.bfloat16)
        if not values[:: max(1, len(values) // _MAX_SAMPLES)].isfinite().all():
            raise FrameRejected("nonfinite", "damaged")


async def receive(transport: str, listen: str) -> None:
    receiver = make_receiver(transport, listen)
    print((await receiver.start(Sink())).address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await receiver.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport_sink", description=__doc__)
    parser.add_argument("transport")
    parser.add_argument("listen")
    arguments = parser.parse_args()
    keep_freed_memory()  # as servers do, as is the next
    freeze_heap()
    asyncio.run(receive(arguments.transport, arguments.listen))


if __name__ == "__main__":
    main()
