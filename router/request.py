"""A valid chat request in the words of the wire: what ``router.api`` makes of a body, and the pipeline runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from protos.language_pb2 import GenerateRequest
from protos.vision_pb2 import VIR_SCOPE_REQUEST, TilingOptions, VirOptions
from router.record import Deadline


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

    @property
    def num_choices(self) -> int:
        return int(self.generate.sampling.n)

    @property
    def needs_scores(self) -> bool:
        """Which tiles of an image are compressed depends on the other images."""
        return self.vir is not None and self.vir.scope == VIR_SCOPE_REQUEST
