"""Pictures, and the language server a vision server delivers to, as far as features are concerned."""

import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from typing_extensions import Buffer

from common.transport.base import Lend
from protos.frame import FrameHeader, FrameRejected, checksum, is_signed_by
from protos.seal import open_payload
from protos.status_pb2 import FEATURE_DTYPE_FLOAT32, Endpoint
from protos.vision_pb2 import EncodeReply, EncodeRequest, TilingOptions
from protos.vision_pb2_grpc import VisionStub
from vision_server.server import VisionServer

TICKET = b"k" * 32
_TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def picture(width: int = 448, height: int = 448, seed: int = 0) -> Image.Image:
    """Coarse noise: neither flat nor so fine that resizing removes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass
class FeatureSink:
    """A ``FrameSink`` that puts the tiles of each image back in order."""

    refuse_with: str | None = None
    refuse_payloads_with: list[str] = field(default_factory=list)  # the next ones
    frames: list[FrameHeader] = field(default_factory=list)
    _tiles: dict[tuple[bytes, int], dict[int, torch.Tensor]] = field(default_factory=dict)
    _payloads: dict[tuple[bytes, int, int], memoryview] = field(default_factory=dict)

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        if self.refuse_with is not None:
            raise FrameRejected(self.refuse_with, "as told")
        if not is_signed_by(packed_header, TICKET):
            raise FrameRejected("ticket", "not signed")
        lent = None if lend is None else lend()
        payload = memoryview(bytearray(header.payload_bytes) if lent is None else lent).cast("B")
        self._payloads[header.request_id, header.image_index, header.first_tile] = payload
        return payload

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        payload = self._payloads.pop((header.request_id, header.image_index, header.first_tile))
        assert payload is memory
        if self.refuse_payloads_with:
            raise FrameRejected(self.refuse_payloads_with.pop(), "as told")
        if header.seal is not None:
            open_payload(header, memory, TICKET)
        elif payload_crc32c != header.payload_crc32c or checksum(payload) != payload_crc32c:
            raise FrameRejected("checksum", "damaged")
        rows = torch.frombuffer(payload, dtype=_TORCH_DTYPE[header.dtype]).view(header.num_tokens, header.hidden_size)
        tiles = self._tiles.setdefault((header.request_id, header.image_index), {})
        for number, tile in enumerate(rows.split(header.tokens_per_tile)):
            assert header.first_tile + number not in tiles, "a tile came twice"
            tiles[header.first_tile + number] = tile
        self.frames.append(header)

    def features(self, request: EncodeRequest) -> torch.Tensor:
        """All tiles of the image ``[num_tiles, tokens, hidden]``; fails if one is missing."""
        return torch.stack(self.tiles(request))

    def tiles(self, request: EncodeRequest) -> list[torch.Tensor]:
        """All tiles of the image, ``[tokens, hidden]`` each; fails if one is missing."""
        tiles = self.tiles_by_number(request)
        return [tiles[number] for number in range(len(tiles))]

    def tiles_by_number(self, request: EncodeRequest) -> dict[int, torch.Tensor]:
        """Those tiles of the image that have come, in order."""
        return dict(sorted(self._tiles[request.request_id, request.image_index].items()))


def make_request(image: bytes, endpoints: Sequence[Endpoint], *, max_tiles: int = 12, **values: Any) -> EncodeRequest:
    """A valid request for float32 features, except for what ``values`` replace. No two images are the same image."""
    defaults: dict[str, Any] = {
        "request_id": secrets.token_bytes(16),
        "mm_hash": bytes(32),
        "image_hash": secrets.token_bytes(32),
        "tiling": TilingOptions(min_dynamic_patch=1, max_dynamic_patch=max_tiles, use_thumbnail=True),
        "deliver_to": endpoints,
        "ticket": TICKET,
        "dtype": FEATURE_DTYPE_FLOAT32,
    }
    return EncodeRequest(image=image, **(defaults | values))


class Neighbourhood:
    """A running vision server, its client, and the receivers of one language server."""

    def __init__(self, server: VisionServer, stub: VisionStub, endpoints: list[Endpoint], sink: FeatureSink) -> None:
        self.server = server
        self.stub = stub
        self.endpoints = endpoints
        self.sink = sink

    def request(self, image: bytes, **values: Any) -> EncodeRequest:
        return make_request(image, self.endpoints, **values)

    async def encode(self, request: EncodeRequest, timeout: float | None = 30) -> EncodeReply:
        reply: EncodeReply = await self.stub.Encode(request, timeout=timeout)
        return reply
