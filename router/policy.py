"""Which server gets which work. Pure: no clocks, no sockets, no state; the caller brings what is known.

Several routers that know the same servers make the same choices without talking to each other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from blake3 import blake3

LOAD_BOUND: Final = Fraction(5, 4)
"""A server may carry this multiple of the mean before equal images go elsewhere; 1.25 as in Mirrokni, Thorup and
Zadimoghaddam, "Consistent Hashing with Bounded Loads" (arXiv 1608.01350)."""
AFFINITY_BOUND: Final = Fraction(3, 2)
"""A server may carry this multiple of the least loaded one's sequences before a prefix it knows goes elsewhere, as in
SGLang's cache-aware router ..."""
AFFINITY_SLACK: Final = 4
"""... or so many sequences more (there 64, which small systems would never reach)."""


def pick_language(prefix: bytes, request_id: bytes, loads: Mapping[str, int], cost: int = 1) -> str | None:
    """The server that probably knows the prompt's beginning, unless others have far less to do.

    Args:
        prefix: identity of the prompt's beginning; equal prefixes meet.
        request_id: equal prefixes that cannot meet are spread by it.
        loads: sequences each server has.
        cost: sequences of this request.

    Returns:
        The first server in the prefix's own order (rendezvous hashing) if with this request it stays within
        ``AFFINITY_BOUND`` or ``AFFINITY_SLACK`` of the least loaded one; else the less loaded of two others that the
        request id draws. Two are enough, and where several routers believe loads of a second ago they do not all run to
        the one that was least loaded then (Mitzenmacher, "The Power of Two Choices", 2001). None without servers.
    """
    if not loads:
        return None
    favourite = min(loads, key=lambda name: _rank(prefix, name))
    least = Fraction(min(loads.values()) + cost)
    if loads[favourite] + cost <= max(AFFINITY_BOUND * least, least + AFFINITY_SLACK):
        return favourite
    drawn = sorted((name for name in loads if name != favourite), key=lambda name: _rank(request_id, name))[:2]
    return min(drawn, key=lambda name: loads[name])


def pick_vision(image_hash: bytes, loads: Mapping[str, int], num_tiles: int = 1) -> str | None:
    """The server on which this image probably is or soon will be, unless it is overloaded.

    Args:
        image_hash: identity of the image; equal images meet, where a server can know them again.
        loads: tiles each server still has to encode.
        num_tiles: of this image; they count as well.

    Returns:
        The first server in the image's own order (rendezvous hashing) that, with this image, has at most ``LOAD_BOUND``
        times the mean, this image included. Where an image is larger than that, it goes to one of the least loaded
        servers. None without servers.
    """
    if not loads:
        return None
    fair = LOAD_BOUND * Fraction(sum(loads.values()) + num_tiles, len(loads))
    bound = max(fair, Fraction(min(loads.values()) + num_tiles))
    return min((name for name in loads if loads[name] + num_tiles <= bound), key=lambda name: _rank(image_hash, name))


def elect_fingerprint(current: bytes | None, reported: Sequence[bytes]) -> bytes | None:
    """The checkpoint this router serves: the present one while any server has it, else the commonest, else the first.

    A server that connects later with another checkpoint can therefore never take over; it is refused.
    """
    if current in reported:
        return current
    counts = Counter(reported)
    return max(counts, key=lambda fingerprint: counts[fingerprint], default=None)


def _rank(key: bytes, name: str) -> bytes:
    return blake3(key + name.encode()).digest(length=8)
