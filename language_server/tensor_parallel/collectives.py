"""What ranks exchange while they compute: sums, copies from rank 0 and pieces for it, through torch.distributed.

NCCL between GPUs, gloo on CPUs. All ranks are on one machine: they meet in a private directory and listen on the
loopback interface only. A peer that is gone or stuck is an error within ``timeout`` seconds, never a hang.
"""

# mypy: disable-error-code="no-untyped-call"
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from common.service.errors import TransportFailed

_LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"
_STORE: Final = "store"
_POLL_SECONDS: Final = 20e-6
_NCCL_EXTRA_SECONDS: Final = 30.0
"""NCCL's own watchdog ends the process. It is the last resort, so it waits longer than we do."""


class Collectives:
    """One rank's side. All methods raise TransportFailed when another rank is gone or does not answer in time."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device, timeout: float) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._timeout = timeout

    def join(self, directory: Path) -> None:
        """Meet the others, who must call this, too. ``directory`` is private and one group's alone."""
        os.environ.update(GLOO_SOCKET_IFNAME=_LOOPBACK, NCCL_SOCKET_IFNAME=_LOOPBACK)
        is_cuda = self.device.type == "cuda"
        with _translated():
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=dist.FileStore(str(directory / _STORE), self.num_ranks),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.num_ranks,
                timeout=timedelta(seconds=self._timeout + (_NCCL_EXTRA_SECONDS if is_cuda else 0)),
                device_id=self.device if is_cuda else None,
            )

    def leave(self) -> None:
        """Harmless for who never joined. Waits for nobody."""
        self.abort()
        if dist.is_initialized():
            dist.destroy_process_group()

    def abort(self) -> None:
        """From any thread: what GPUs wait for will not come. On CPUs a peer that ends ends all waiting by itself."""
        if self.device.type == "cuda" and (group := dist.group.WORLD) is not None:
            group.abort()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        with _translated():
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        with _translated():
            dist.broadcast(tensor, src=0)
        return tensor

    def to_first(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Everybody's, by rank, for rank 0; None for the others. All have one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.num_ranks)] if self.rank == 0 else None
        with _translated():
            dist.gather(tensor, parts, dst=0)
        return parts

    def wait(self, check: Callable[[], None]) -> None:
        """Until the GPU has finished what it was given, while ``check`` has no objection. A CPU always has."""
        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self._timeout
        while not done.query():
            check()
            if time.monotonic() > deadline:
                raise TransportFailed(f"a step has taken more than {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)


@contextmanager
def _translated() -> Iterator[None]:
    """Seam: what torch.distributed raises becomes ours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TransportFailed(f"another rank is gone or does not answer ({type(error).__name__})") from error
