"""Which server gets which work. Pure: no clocks, no sockets, no state; the caller brings what is known.

Several routers that know the same servers make the same choices without talking to each other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from blake3 import blake3

LOAD_BOUND = Fraction(5, 4)
"""A server may carry this multiple of the mean before equal images go elsewhere; 1.25 as in Mirrokni, Thorup and
Zadimoghaddam, "Consistent Hashing with Bounded Loads" (arXiv 1608.01350)."""


def pick_language(request_id: bytes, loads: Mapping[str, int]) -> str | None:
    """The server with the fewest sequences; equals share by request id. None if there is no server."""
    return min(loads, key=lambda name: (loads[name], _rank(request_id, name)), default=None)


def pick_vision(image_hash: bytes, loads: Mapping[str, int]) -> str | None:
    """The server on which this image probably is or soon will be, unless it is overloaded.

    Args:
        image_hash: identity of the image; equal images meet, where a server can know them again.
        loads: tiles each server still has to encode.

    Returns:
        The first server in the image's own order (rendezvous hashing) whose load is at most ``LOAD_BOUND`` times the
        mean. The least loaded server always qualifies. None without servers.
    """
    if not loads:
        return None
    bound = LOAD_BOUND * Fraction(sum(loads.values()), len(loads))
    return min((name for name in loads if loads[name] <= bound), key=lambda name: _rank(image_hash, name))


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
