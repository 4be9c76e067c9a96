"""What one tenant may take: requests at a time, and requests, tokens and tiles per minute.

Pure: whoever asks says what time it is, in seconds of one monotonic clock. A bucket holds at most what a minute brings,
so a tenant may take a minute's worth at once and then goes on as fast as the bucket fills. What a request costs is
estimated before any server sees it and corrected when it has ended. Knows nothing of keys and of HTTP.
"""

from dataclasses import dataclass
from typing import Final, Literal

from common.service.errors import RateLimited

Reason = Literal["concurrency", "requests", "tokens", "tiles"]

_MINUTE: Final = 60.0
_BUSY_SECONDS: Final = 1.0
"""After which one of too many requests at a time may be tried again: when the others end is not known."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Most of each; None: as many as there are. Tiles are those of images and videos, thumbnails included."""

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tiles_per_minute: int | None = None

    def divided_among(self, num_sharers: int) -> "Quota":
        """The part of one of several router processes that know nothing of each other: rounded up, so that together
        they grant what the quota says and less than one more of each for every process."""

        def part(limit: int | None) -> int | None:
            return None if limit is None else -(-limit // num_sharers)

        return Quota(
            part(self.max_concurrent_requests),
            part(self.requests_per_minute),
            part(self.tokens_per_minute),
            part(self.tiles_per_minute),
        )


class Bucket:
    """Fills with ``per_minute`` a minute, and is full at first. Below 0: more was taken than was there."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What is there."""
        if now > self._at:
            self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
            self._at = now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be taken. For more than it ever holds, until it is full: then it is never."""
        missing = min(amount, self.per_minute) - self.level(now)
        return max(0.0, missing * _MINUTE / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Also more than is there. A negative amount is given back."""
        self._level = min(self.per_minute, self.level(now) - amount)

    def seconds_until_full(self, now: float) -> float:
        return self.wait(self.per_minute, now)

    def resize(self, per_minute: int, now: float) -> None:
        """From now on. What has been taken stays taken."""
        taken = self.per_minute - self.level(now)
        self.per_minute = per_minute
        self._level = per_minute - taken


class Meter:
    """What one tenant has taken of its quota. ``enter`` and the grant's ``charge`` succeed at once or raise."""

    def __init__(self, quota: Quota, now: float) -> None:
        self._quota = Quota()
        self._buckets: dict[Reason, Bucket] = {}
        self.num_running = 0
        self.set_quota(quota, now)

    def set_quota(self, quota: Quota, now: float) -> None:
        """Another quota, for what comes from now on."""
        self._quota = quota
        self._set("requests", quota.requests_per_minute, now)
        self._set("tokens", quota.tokens_per_minute, now)
        self._set("tiles", quota.tiles_per_minute, now)

    def enter(self, now: float) -> "Grant":
        """One request. Refused as well while an earlier one has used up the tokens or tiles, before its body is read.

        Raises:
            RateLimited: ``reason`` says which limit.
        """
        limit = self._quota.max_concurrent_requests
        if limit is not None and self.num_running >= limit:
            message = f"at most {limit} requests at a time are allowed"
            raise RateLimited(message, reason="concurrency", retry_after=_BUSY_SECONDS)
        self._check({"requests": 1, "tokens": 1, "tiles": 0}, now)
        self._take("requests", 1, now)
        self.num_running += 1
        return Grant(self)

    def headers(self, now: float) -> dict[str, str]:
        """What clients of OpenAI read: the limits, what is left, and how long until all of it is there again."""
        headers = {}
        for reason in ("requests", "tokens"):
            bucket = self._buckets.get(reason)
            if bucket is not None:
                headers[f"x-ratelimit-limit-{reason}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{reason}"] = str(max(0, int(bucket.level(now))))
                headers[f"x-ratelimit-reset-{reason}"] = _duration(bucket.seconds_until_full(now))
        return headers

    def _set(self, reason: Reason, per_minute: int | None, now: float) -> None:
        if per_minute is None:
            self._buckets.pop(reason, None)
        elif reason in self._buckets:
            self._buckets[reason].resize(per_minute, now)
        else:
            self._buckets[reason] = Bucket(per_minute, now)

    def _check(self, amounts: dict[Reason, int], now: float) -> None:
        for reason, amount in amounts.items():
            bucket = self._buckets.get(reason)
            if bucket is not None and (seconds := bucket.wait(amount, now)) > 0:
                message = f"at most {bucket.per_minute} {reason} per minute are allowed"
                raise RateLimited(message, reason=reason, retry_after=seconds)

    def _take(self, reason: Reason, amount: int, now: float) -> None:
        if reason in self._buckets:
            self._buckets[reason].take(amount, now)


class Grant:
    """One request that was let in, until ``end``."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._num_tokens = 0
        self._num_tiles = 0
        self._has_ended = False

    def charge(self, num_tokens: int, num_tiles: int, now: float) -> None:
        """What it will cost, at most. Nothing is taken of one limit where the other refuses.

        Raises:
            RateLimited: there is not so much left. A request that is larger than a minute's worth waits for a full one.
        """
        self._meter._check({"tokens": num_tokens, "tiles": num_tiles} if num_tiles else {"tokens": num_tokens}, now)
        self._take(num_tokens, num_tiles, now)

    def end(self, num_tokens: int, now: float, *, is_taken: bool = True) -> None:
        """It is over; safe to call again.

        Args:
            num_tokens: it cost in the end.
            is_taken: a server worked on it; else its tiles are given back as well.
        """
        if self._has_ended:
            return
        self._has_ended = True
        self._meter.num_running -= 1
        self._take(num_tokens - self._num_tokens, 0 if is_taken else -self._num_tiles, now)

    def _take(self, num_tokens: int, num_tiles: int, now: float) -> None:
        self._meter._take("tokens", num_tokens, now)
        self._meter._take("tiles", num_tiles, now)
        self._num_tokens += num_tokens
        self._num_tiles += num_tiles


def _duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``1.5s``, ``6m0s``."""
    milliseconds = round(seconds * 1e3)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1e3:g}s" if minutes else f"{rest / 1e3:g}s"
