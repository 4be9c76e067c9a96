"""``python -m tests.common.service.waiting_caller ADDRESS``: a call that lasts, in a process that a test may stop."""

import asyncio
import sys

from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service.rpc import make_leased_channel


async def main(address: str) -> None:
    stub = health_pb2_grpc.HealthStub(make_leased_channel(address))
    async for _ in stub.Watch(health_pb2.HealthCheckRequest()):
        print("connected", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
