"""Numbers on their way to the device, without making the host wait for what the device is doing."""

from collections.abc import Sequence

import torch


def to_device(
    values: Sequence[int] | Sequence[float] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """A tensor of ``values`` on ``device``. ``torch.tensor(values, device=...)`` would wait: it copies from memory that
    the system may move, and such a copy ends only with everything that was asked of the device before it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy of ``values`` for the host to read, and what has to happen before; None: nothing, they are there."""
    if not values.is_cuda:
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, record_event()


def record_event() -> torch.cuda.Event:
    """Happens when the device has done what it has been asked so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()  # type: ignore[no-untyped-call]
    return event
