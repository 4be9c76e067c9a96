"""A valid chat request in the words of the wire: what ``router.api`` makes of a body, and the pipeline runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protos.language_pb2 import GenerateRequest
from protos.vision_pb2 import (
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_REQUEST,
    TilingOptions,
    VirOptions,
)
from router.record import Deadline

_BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image, video or frame of a request, priced but not decoded."""

    data: bytes
    image_hash: bytes  # 32 bytes: content, tiling, tenant scope
    mm_hash: bytes  # 32 bytes, of the features: the same, and what ViR is told
    num_tiles: int  # thumbnail included
    tiling: TilingOptions
    param: str  # where it stands in the request, for error messages


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Everything that is known before a server is asked."""

    generate: GenerateRequest
    images: Sequence[ImageInput]  # in prompt order
    deadline: Deadline
    vir: VirOptions | None = None  # of all images; None: not a Flash model
    prefix: bytes | None = None  # 32 bytes, see affinity.py
    split_min_tiles: int = 0  # of an image that may be divided among servers, each gets so many at least; 0: it may not

    @property
    def num_prompt_tokens(self) -> int:
        """About so many, before anybody has counted: those of images at most, and of text one for four bytes."""
        num_image_tokens = sum(image.max_num_tokens for image in self.generate.images)
        return num_image_tokens + self.generate.ByteSize() // _BYTES_PER_TOKEN

    @property
    def max_num_tokens(self) -> int:
        """The same and its replies at most, as far as the client has said how long they may be."""
        return self.num_prompt_tokens + self.num_choices * int(self.generate.sampling.max_tokens)

    @property
    def num_choices(self) -> int:
        return int(self.generate.sampling.n)

    @property
    def needs_scores(self) -> bool:
        """Which tiles of an image are compressed depends on the other images."""
        return self.vir is not None and self.vir.scope == VIR_SCOPE_REQUEST

    def may_divide(self, image: ImageInput) -> bool:
        """Whether its tiles can be encoded apart: none of them is compared with others, nor known to one server already
        (the server that scored it keeps what it saw); and every server would decode all of a video."""
        if not self.split_min_tiles or image.tiling.num_frames:
            return False
        vir = self.vir
        return vir is None or vir.mode in (VIR_MODE_OFF, VIR_MODE_FORCE64) or vir.scope == VIR_SCOPE_ABSOLUTE
