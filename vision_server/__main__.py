"""``python -m vision_server --model DIRECTORY ...``: startup -> serve -> drain."""

import sys
from collections.abc import Sequence

import torch

from common.service.program import run_program, run_worker
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

TITLE = "vision server"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a vision server until SIGTERM or SIGINT; returns the exit status."""
    return run_program(TITLE, VisionSettings, argv, run)


async def run(settings: VisionSettings) -> int:
    """0 after a drain, 1 when the device thread died."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return await run_worker(TITLE, lambda: VisionServer(settings))


if __name__ == "__main__":
    sys.exit(main())
