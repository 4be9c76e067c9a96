"""What the two ends of the ``shm`` transport say to each other; ``shm`` tells when."""

import struct
from typing import Final

from protos.frame import MAX_HEADER_BYTES

INLINE_BYTES: Final = 32 * 2**10
"""Payloads up to here travel in the message: less work for both ends than a segment."""
MAGIC: Final = b"DVDS"
VERSION: Final = 1

HELLO: Final = struct.Struct("<4sHxxQ")
"""Magic, version, and how many bytes of segments the receiver may keep."""
WELCOME: Final = struct.Struct("<4sH")
"""Magic, version."""
FRAME: Final = struct.Struct("<BxHIQQQ")
"""Kind, bytes of the header, segment (0: none), number of the frame, bytes of the payload, and how many of them are
written; then the header, and the payload if there is no segment. With a descriptor the segment is new."""
WRITTEN: Final = struct.Struct("<BxxxxxxxQQ")
"""Kind, number of the frame, bytes of its payload that are written by now."""
FORGET: Final = struct.Struct("<BxxxI")
"""Kind, segment: it will not be used again."""
VERDICT: Final = struct.Struct("<BxxxxxxxQ")
"""Kind, number of the frame; then the word."""
RELEASE: Final = struct.Struct("<BxxxI")
"""Kind, segment: nobody at the receiver reads it any more."""

FRAME_KIND: Final = 1
WRITTEN_KIND: Final = 2
FORGET_KIND: Final = 3
VERDICT_KIND: Final = 4
RELEASE_KIND: Final = 5

MAX_MESSAGE_BYTES: Final = FRAME.size + MAX_HEADER_BYTES + INLINE_BYTES
"""To the receiver."""
MAX_ANSWER_BYTES: Final = 64
"""To the sender."""
