"""The tower's layers through ``torch.compile``, which fuses norms, layer scale and residuals on a GPU.

All layers share one compiled function, or two: for one tile, and for several. Compiling takes tens of seconds, so it is
an option, and what it makes is kept between runs.
"""

# mypy: disable-error-code="no-untyped-call"
from collections.abc import Callable
from typing import Any

from common.model.compiled import keep_compiled
from vision_server.internvit import InternViT


def compile_tower(tower: InternViT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the layers compiled when they first run. ``backend``: of ``torch.compile``."""
    keep_compiled()
    for layer in tower.encoder.layers[: tower.num_layers_run]:
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
