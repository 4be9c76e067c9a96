"""CUDA graphs: a computation that was captured once, and is replayed with one launch.

It finds its inputs, and leaves its results, in memory that stays where it is. A graph is anything with ``replay``:
without a GPU the same computation runs operation by operation. Knows nothing of models.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

_NUM_WARM_UPS: Final = 2
"""Before a capture: the first compiles kernels, and libraries take memory for themselves."""


class Graph(Protocol):
    def replay(self) -> None:
        """Compute once more, from what the buffers hold now into the same memory."""


Capture = Callable[[Callable[[], None]], Graph]
"""Makes a graph of a computation, which it runs at least once."""


class Repeat:
    """What a graph does, without a GPU."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self.replay = compute
        compute()


class CudaCapture:
    """The graphs share their memory: no two run at once. For the device that is the thread's current one."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], None]) -> Graph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        return graph
