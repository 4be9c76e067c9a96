"""One end of a transport in a process of its own, to be stopped and killed.

``receive NAME LISTEN`` prints the address it listens on; ``send NAME ADDRESS`` sends frames of 1 MiB until it dies and
prints a line when the first has arrived.
"""

import asyncio
import itertools
import sys

from common.transport.registry import make_receiver, make_sender
from common.transport.sender import TransportLimits
from tests.common.transport.fakes import MIB_TOKENS, MemorySink, make_frame

SECONDS = 60.0


async def receive(transport: str, listen: str) -> None:
    receiver = make_receiver(transport, listen)
    endpoint = await receiver.start(MemorySink())
    print(endpoint.address, flush=True)
    await asyncio.Event().wait()


async def send(transport: str, address: str) -> None:
    sender = make_sender(transport, address, TransportLimits())
    for number in itertools.count(1):
        _, packed, payload = make_frame(number=number, num_tokens=MIB_TOKENS)
        await sender.send(packed, payload, SECONDS)
        if number == 1:
            print("sending", flush=True)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    asyncio.run({"receive": receive, "send": send}[role](*arguments))
