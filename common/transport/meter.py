"""Counting frames at both ends (API.md section 8). Every label comes from a closed set."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from common.service import metrics
from common.service.errors import DeadlineExceeded, TransportFailed
from protos.frame import FrameRejected

REASONS: Final = frozenset(
    (
        "magic", "version", "fingerprint", "ticket", "dtype", "shape", "size", "checksum", "seal", "nonfinite",
        "unsealed", "unknown_request", "tombstone", "stale",
    )
)  # fmt: skip
"""Why a frame never reached the model."""


class SendMeter:
    """Counts what one sender does."""

    def __init__(self, transport: str) -> None:
        self._ends = (transport, "send")
        self._seconds = metrics.TRANSFER_SECONDS.labels(*self._ends)
        self._credit_seconds = metrics.TRANSFER_CREDIT_WAIT_SECONDS.labels(*self._ends)
        self._bytes = metrics.TRANSFER_BYTES.labels(*self._ends)

    @contextmanager
    def sending(self, num_bytes: int) -> Iterator[None]:
        """One frame, from the call to its verdict."""
        start = time.perf_counter()
        try:
            yield
        except FrameRejected as rejection:
            _count_rejection(self._ends, rejection.reason)
            raise
        except TransportFailed:
            self._fail("connection")
            raise
        except DeadlineExceeded:
            self._fail("deadline")
            raise
        except asyncio.CancelledError:
            metrics.TRANSFER_ITEMS.labels(*self._ends, "cancelled").inc()
            raise
        metrics.TRANSFER_ITEMS.labels(*self._ends, "ok").inc()
        self._bytes.inc(num_bytes)
        self._seconds.observe(time.perf_counter() - start)

    @contextmanager
    def waiting_for_credit(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._credit_seconds.observe(time.perf_counter() - start)

    def _fail(self, reason: str) -> None:
        metrics.TRANSFER_FAILURES.labels(*self._ends, reason).inc()
        metrics.TRANSFER_ITEMS.labels(*self._ends, "failed").inc()


class ReceiveMeter:
    """Counts what one receiver takes in."""

    def __init__(self, transport: str) -> None:
        self._ends = (transport, "receive")
        self._bytes = metrics.TRANSFER_BYTES.labels(*self._ends)

    def received(self, verdict: str, num_bytes: int) -> None:
        """One frame, with the verdict of ``receive_frame``."""
        if verdict in ("ok", "duplicate"):
            metrics.TRANSFER_ITEMS.labels(*self._ends, verdict).inc()
            self._bytes.inc(num_bytes)
        else:
            _count_rejection(self._ends, verdict)

    def malformed(self) -> None:
        """A message that is no frame at all: nobody can be answered."""
        _count_rejection(self._ends, "magic")

    def unanswered(self) -> None:
        """A verdict that could not be sent back; the sender's deadline or its own loss will tell it."""
        metrics.TRANSFER_FAILURES.labels(*self._ends, "acknowledgement").inc()


def _count_rejection(ends: tuple[str, str], reason: str) -> None:
    metrics.TRANSFER_ITEMS.labels(*ends, "rejected").inc()
    metrics.TRANSFER_FRAMES_REJECTED.labels(*ends, reason if reason in REASONS else "unknown").inc()
