"""A vision server in this process, for one caller: it listens where nobody else can reach it."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import torch

from deploy.encode.settings import EncodeSettings
from deploy.settings import model_directory
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

_TIMEOUT_SECONDS: Final = 86400.0
"""Nobody else waits: a slow machine is no fault."""
_TILES_PER_IMAGE: Final = 255
"""Most that can be asked for; the thumbnail comes on top."""


@asynccontextmanager
async def local_server(settings: EncodeSettings, model: str) -> AsyncIterator[VisionServer]:
    """A server that has started, and answers what it is; ``load`` it before it is asked for more.

    Raises:
        StartupError: the checkpoint or the machine does not allow it.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="dvd-") as directory:  # mode 0700
        server = VisionServer(_vision_settings(settings, model_directory(model), Path(directory)))
        try:
            await server.start()
            yield server
        finally:
            server.abort_load()
            await server.close()


def _vision_settings(settings: EncodeSettings, model: Path, directory: Path) -> VisionSettings:
    values: dict[str, Any] = {
        "model": model,
        "listen": f"unix:{directory}/vision.sock",
        "metrics_listen": None,
        "device": settings.device,
        "dtype": settings.compute_dtype,
        "max_pixels": settings.max_pixels,
        "max_tiles_per_image": _TILES_PER_IMAGE,
        # Everything that is asked for at once is let in.
        "max_queued_tiles": settings.max_tiles_in_flight + _TILES_PER_IMAGE + 1,
        "feature_cache_bytes": 0,  # every image is asked for once
        "batch_invariant": settings.batch_invariant,
        "encode_timeout": _TIMEOUT_SECONDS,
    }
    return VisionSettings(**values)
