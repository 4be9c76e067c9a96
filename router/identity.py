"""What makes two images the same: 32 bytes each, never made by a client (API.md section 3).

``image_hash`` names the tiles, ``mm_hash`` their features. They differ for Flash models only, where the features also
depend on what ViR is told and, with scope REQUEST, on all other images of the request.
"""

import struct
from collections.abc import Sequence

from blake3 import blake3

from protos.vision_pb2 import VIR_MODE_AUTO, VIR_SCOPE_IMAGE, VIR_SCOPE_REQUEST, TilingOptions, VirOptions


def hash_image(data: bytes, tiling: TilingOptions, tile_size: int, scope: str) -> bytes:
    """Of the tiles: content, tiling and tenant scope."""
    digest = blake3(data, max_threads=1).digest()
    options = struct.pack(
        "<III??I",
        tiling.min_dynamic_patch,
        tiling.max_dynamic_patch,
        tile_size,
        tiling.use_thumbnail,
        tiling.exif_orientation,
        tiling.num_frames,
    )
    return blake3(digest + options + scope.encode()).digest()


def hash_features(image_hash: bytes, vir: VirOptions | None, request_hashes: Sequence[bytes]) -> bytes:
    """Of the features of these tiles. Only what counts makes a difference: a forced mode has no thresholds.

    Args:
        vir: None where every tile has all its tokens because the model knows nothing else.
        request_hashes: image hashes of all images of the request, in any order.
    """
    if vir is None:
        return image_hash
    parts = [image_hash, struct.pack("<I", vir.mode)]
    if vir.mode == VIR_MODE_AUTO:
        parts.append(struct.pack("<If", vir.scope, vir.absolute_threshold))
        if vir.scope in (VIR_SCOPE_REQUEST, VIR_SCOPE_IMAGE):
            parts.append(struct.pack("<f", vir.relative_threshold))
        if vir.scope == VIR_SCOPE_REQUEST:
            parts.extend(sorted(request_hashes))
    return blake3(b"".join(parts)).digest()
