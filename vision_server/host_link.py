"""Tiles onto the device and results back, so that copies and arithmetic of different batches run at the same time.

On CUDA each direction has a stream of its own and goes through pinned memory, and batches have one: while a batch is
computed, the next one is uploaded and the last one downloaded. What ends an image (projections, once its tiles are
routed) has another of higher priority, or it would wait for a batch that was launched before. On a CPU there is nothing
to move. Knows nothing of models.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vision_server.tiling import Tiles

T_co = TypeVar("T_co", covariant=True)
_T = TypeVar("_T")
_DEPTH: Final = 2
"""Batches under way at once: one that is computed, and one that is on its way to the device or back."""
_HIGH: Final = -1
"""CUDA's priorities grow downwards from 0."""


class Pending(Protocol[T_co]):
    """Something the device is working on."""

    def is_done(self) -> bool:
        """Whether ``result`` would not wait. Raises what the device raised."""
        ...

    def result(self) -> T_co:
        """Wait for it. Raises what the device raised."""
        ...


class Done(Generic[T_co]):
    """What needs no waiting."""

    def __init__(self, value: T_co) -> None:
        self._value = value

    def is_done(self) -> bool:
        return True

    def result(self) -> T_co:
        return self._value


class Then(Generic[_T, T_co]):
    """What is made of a pending value once it is there."""

    def __init__(self, pending: Pending[_T], make: Callable[[_T], T_co]) -> None:
        self._pending = pending
        self._make = make

    def is_done(self) -> bool:
        return self._pending.is_done()

    def result(self) -> T_co:
        return self._make(self._pending.result())


class HostLink:
    """Between the host and a device that does everything at once.

    Args:
        on_progress: called whenever the device got on: a sign of life.
    """

    depth = 1

    def __init__(self, device: torch.device, on_progress: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._on_progress = on_progress

    def batches(self) -> AbstractContextManager[None]:
        """Inside, one batch is computed behind the other, and behind all else that was asked of the device before."""
        return nullcontext()

    def aside(self, inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside, what needs no more than ``inputs`` is computed before batches that were launched already.

        Only for inputs whose batch has been waited for, or that were made of such.
        """
        return nullcontext()

    def upload(self, parts: Sequence[Tiles]) -> Tensor:
        """Tiles ``[n, S, S, 3]`` each, one behind another on the device, still as bytes: a quarter of what pixels in
        float32 would take."""
        return torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0]).to(self._device)

    def mark(self) -> None:
        """A station of the batch that is being launched: ``on_progress`` is called once the device is there."""
        self._on_progress()

    def download(self, parts: Sequence[Tensor]) -> Pending[list[Tensor]]:
        """The tensors in host memory, each in its own if there are several: one may be kept without the others."""
        return Done([part.to("cpu", copy=len(parts) > 1) for part in parts])


class Streams(Protocol):
    """What the link needs of ``torch.cuda``, on one device."""

    def make(self, priority: int = 0) -> Any:
        """A stream."""

    def current(self) -> Any:
        """The stream that operations of this thread go to."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, it is the current one."""

    def record(self) -> Any:
        """An event: the current stream has done what it was asked so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """What ``stream`` is asked from now on comes after ``event``."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Do not use the tensor's memory again before ``stream`` has done what it was asked until it was freed."""

    def to_device(self, host: Tensor) -> Tensor:
        """Begin to copy pinned memory."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies by itself."""


class CudaStreams:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, priority: int = 0) -> Any:
        return torch.cuda.Stream(self._device, priority=priority)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record(self) -> Any:
        # Blocking: who waits sleeps, where CUDA would otherwise keep a core busy with asking.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.current())  # type: ignore[no-untyped-call]
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def to_device(self, host: Tensor) -> Tensor:
        return host.to(self._device, non_blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)


class CudaLink(HostLink):
    """Between the host and a CUDA device. One thread uses it."""

    depth = _DEPTH

    def __init__(
        self, device: torch.device, on_progress: Callable[[], None] = lambda: None, streams: Streams | None = None
    ) -> None:
        """``streams``: the device's, by default those of torch."""
        super().__init__(device, on_progress)
        streams = streams or CudaStreams(device)
        self._streams = streams
        self._up, self._down, self._batches = streams.make(), streams.make(), streams.make()
        self._aside = streams.make(_HIGH)
        self._staging = deque(_Staging(streams) for _ in range(_DEPTH + 1))
        self._marks: deque[Any] = deque()

    @contextmanager
    def batches(self) -> Iterator[None]:
        self._streams.wait(self._batches, self._streams.record())
        with self._streams.use(self._batches):
            yield

    @contextmanager
    def aside(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        self._streams.wait(self._aside, self._streams.record())
        for tensor in inputs:
            self._streams.keep(tensor, self._aside)
        with self._streams.use(self._aside):
            yield

    def upload(self, parts: Sequence[Tiles]) -> Tensor:
        computing = self._streams.current()
        self._staging.rotate(1)
        host = self._staging[0].fill(parts)
        with self._streams.use(self._up):
            uploaded = self._streams.to_device(host)
            copied = self._staging[0].has_left = self._streams.record()
        self._streams.wait(computing, copied)
        self._streams.keep(uploaded, computing)
        return uploaded

    def mark(self) -> None:
        self._marks.append(self._streams.record())

    def download(self, parts: Sequence[Tensor]) -> Pending[list[Tensor]]:
        """In pinned memory. A stream other than that of batches copies by itself: behind a batch's result it would wait
        for that batch."""
        computing = self._streams.current()
        copying = self._down if computing == self._batches else computing
        hosts = [self._streams.pinned(part.shape, part.dtype) for part in parts]
        self._streams.wait(copying, self._streams.record())
        with self._streams.use(copying):
            for host, part in zip(hosts, parts, strict=True):
                host.copy_(part, non_blocking=True)
                self._streams.keep(part, copying)
            copied = self._streams.record()
        marks, self._marks = self._marks, deque()
        return _Download(hosts, copied, marks, self._on_progress)


class _Staging:
    """Pinned memory that tiles leave from; not to be written again before they have."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._memory: Tensor | None = None
        self.has_left: Any = None

    def fill(self, parts: Sequence[Tiles]) -> Tensor:
        if self.has_left is not None:
            self.has_left.synchronize()
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        if self._memory is None or self._memory.numel() < math.prod(shape):
            self._memory = self._streams.pinned((math.prod(shape),), torch.uint8)
        host = self._memory[: math.prod(shape)].view(shape)
        np.concatenate(parts, out=host.numpy())
        return host


class _Download:
    def __init__(self, hosts: list[Tensor], copied: Any, marks: deque[Any], on_progress: Callable[[], None]) -> None:
        self._hosts = hosts
        self._copied = copied
        self._marks = marks
        self._on_progress = on_progress

    def is_done(self) -> bool:
        while self._marks and self._marks[0].query():
            self._pass()
        return bool(self._copied.query())

    def result(self) -> list[Tensor]:
        while self._marks:
            self._marks[0].synchronize()
            self._pass()
        self._copied.synchronize()
        return self._hosts

    def _pass(self) -> None:
        self._marks.popleft()
        self._on_progress()


def make_link(device: torch.device, on_progress: Callable[[], None] = lambda: None) -> HostLink:
    """What suits the device."""
    return (CudaLink if device.type == "cuda" else HostLink)(device, on_progress)
