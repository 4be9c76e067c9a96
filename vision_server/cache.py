"""What was computed of images lately, so that the same image is not encoded twice.

Of a base checkpoint the features, of a Flash checkpoint what lies between tower and projector: it does not depend on
which tiles are compressed, and so serves every scope, every mode and every set of images a request may have. Keys come
from the router and cover content, tiling and tenant scope (RELIABILITY.md 5.4); another checkpoint is another server.
Pure but for metrics: knows nothing of devices, clocks or event loops.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from common.service import metrics
from vision_server.device_jobs import EncodedGroup, Group


class GroupCache:
    """Groups of tiles by image, least recently used first out, at most ``capacity_bytes`` in all."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Hashable, tuple[Sequence[Group], int]] = OrderedDict()
        self.num_bytes = 0
        metrics.VISION_CACHE_LIMIT_BYTES.set(capacity_bytes)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Sequence[Group] | None:
        """All groups of an image in tile order, or None."""
        metrics.VISION_CACHE_QUERIES.inc()
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        metrics.VISION_CACHE_HITS.inc()
        metrics.VISION_CACHE_HIT_TOKENS.inc(
            sum(sum(group.tokens_per_tile) for group in entry[0] if isinstance(group, EncodedGroup))
        )
        return entry[0]

    def put(self, key: Hashable, groups: Sequence[Group]) -> None:
        """Keep a whole image, unless it alone is larger than the cache."""
        num_bytes = sum(group.num_bytes for group in groups)
        if num_bytes > self._capacity_bytes:
            return
        self._drop(key)
        self._entries[key] = (groups, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self._capacity_bytes:
            self._drop(next(iter(self._entries)))
            metrics.VISION_CACHE_EVICTIONS.inc()
        self._export()

    def _drop(self, key: Hashable) -> None:
        _, num_bytes = self._entries.pop(key, ((), 0))
        self.num_bytes -= num_bytes

    def _export(self) -> None:
        metrics.VISION_CACHE_ENTRIES.set(len(self._entries))
        metrics.VISION_CACHE_BYTES.set(self.num_bytes)
