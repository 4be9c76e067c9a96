"""What callers may ask of a vision server: requests of the wire, checked, in the words of this program.

Everything that is wrong is refused here, before anything is spent, with the field that is wrong.
"""

import math
from dataclasses import replace
from typing import Final, Literal

import torch
from google.protobuf.internal.containers import RepeatedScalarFieldContainer

from common.model.config import InternVLConfig
from common.model.geometry import Tiling
from common.service.errors import InvalidRequest
from protos.frame import MAX_TILES, FeatureDtypeName
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16, FEATURE_DTYPE_FLOAT32
from protos.vision_pb2 import (
    FEATURE_KIND_LAST_HIDDEN_STATE,
    FEATURE_KIND_PROJECTED,
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
    EncodeRequest,
    ExtractRequest,
    ScoreRequest,
    TilingOptions,
    VirOptions,
)
from vision_server.decode_pool import MediaOptions
from vision_server.vir import VirChoice

TORCH_DTYPE: Final[dict[FeatureDtypeName, torch.dtype]] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_WIRE_DTYPE: Final[dict[int, FeatureDtypeName]] = {
    FEATURE_DTYPE_BFLOAT16: "bfloat16",
    FEATURE_DTYPE_FLOAT32: "float32",
}
_MODES: Final[dict[int, Literal["off", "auto", "force64"]]] = {
    VIR_MODE_OFF: "off",
    VIR_MODE_AUTO: "auto",
    VIR_MODE_FORCE64: "force64",
}
_SCOPES: Final[dict[int, Literal["request", "image", "absolute"]]] = {
    VIR_SCOPE_REQUEST: "request",
    VIR_SCOPE_IMAGE: "image",
    VIR_SCOPE_ABSOLUTE: "absolute",
}
_ID_BYTES: Final = {"request_id": 16, "mm_hash": 32, "image_hash": 32, "ticket": 32}
_MAX_ATTEMPT: Final = 2**16 - 1
_MAX_REQUEST_SCORES: Final = 128 * MAX_TILES
OFF: Final = VirChoice("off")


class RequestReader:
    """Reads the requests of one server.

    Args:
        max_tiles: of one image, thumbnail not counted.
    """

    def __init__(self, config: InternVLConfig, max_tiles: int) -> None:
        self._config = config
        self._max_tiles = max_tiles

    def encode(self, request: EncodeRequest) -> tuple[MediaOptions, FeatureDtypeName, VirChoice]:
        """Raises InvalidRequest."""
        for name, size in _ID_BYTES.items():
            _check_length(name, getattr(request, name), size)
        if not request.deliver_to:
            raise InvalidRequest("deliver_to is empty", param="deliver_to")
        if request.attempt > _MAX_ATTEMPT:
            raise InvalidRequest(f"attempt must be at most {_MAX_ATTEMPT}", param="attempt")
        choice, options = self._choice(request), self._medium(request.image, request.tiling)
        return self._part(request, options, choice), _dtype(request.dtype), choice

    def score(self, request: ScoreRequest) -> MediaOptions:
        """Raises InvalidRequest."""
        if self._config.flash is None:
            raise InvalidRequest("this checkpoint has no resolution router", code="unsupported_parameter")
        _check_length("image_hash", request.image_hash, _ID_BYTES["image_hash"])
        return self._medium(request.image, request.tiling)

    def extract(self, request: ExtractRequest) -> tuple[MediaOptions, FeatureDtypeName, VirChoice, bool]:
        """With whether the tower's hidden states are wanted. Raises InvalidRequest."""
        if request.kind not in (FEATURE_KIND_PROJECTED, FEATURE_KIND_LAST_HIDDEN_STATE):
            raise InvalidRequest("kind must be PROJECTED or LAST_HIDDEN_STATE", param="kind")
        medium = self._medium(request.image, request.tiling)
        is_states = request.kind == FEATURE_KIND_LAST_HIDDEN_STATE
        return medium, _dtype(request.dtype), OFF if is_states else self._choice(request), is_states

    def _medium(self, data: bytes, tiling: TilingOptions) -> MediaOptions:
        if not data:
            raise InvalidRequest("the image is empty", param="image", code="invalid_image")
        model = self._config.tiling
        if tiling.num_frames:
            if tiling.num_frames > MAX_TILES:
                raise InvalidRequest(f"num_frames must be at most {MAX_TILES}", param="tiling")
            one = Tiling(1, 1, use_thumbnail=False, tile_size=model.tile_size, dynamic=model.dynamic)
            return MediaOptions(one, num_frames=tiling.num_frames)
        low, high = tiling.min_dynamic_patch, tiling.max_dynamic_patch
        if not 1 <= low <= high <= self._max_tiles:
            limits = f"need 1 <= min <= max <= {self._max_tiles} tiles"
            raise InvalidRequest(f"{limits}, got {low} and {high}", param="tiling")
        wanted = Tiling(low, high, tiling.use_thumbnail, model.tile_size, model.dynamic)
        return MediaOptions(wanted, exif_orientation=tiling.exif_orientation)

    def _part(self, request: EncodeRequest, options: MediaOptions, choice: VirChoice) -> MediaOptions:
        """What is wanted of the medium's tiles."""
        first_tile, num_tiles = request.first_tile, request.num_tiles
        if first_tile >= options.max_tiles or num_tiles > options.max_tiles - first_tile:
            raise InvalidRequest(f"no more than {options.max_tiles} tiles are possible", param="first_tile")
        wanted = replace(options, first_tile=first_tile, num_tiles=num_tiles)
        if wanted.is_part and choice.needs_all_tiles:
            raise InvalidRequest("with vir.scope IMAGE an image is encoded as a whole", param="first_tile")
        return wanted

    def _choice(self, request: EncodeRequest | ExtractRequest) -> VirChoice:
        if self._config.flash is None:
            if request.HasField("vir"):
                raise InvalidRequest("this checkpoint has no resolution router", param="vir")
            return OFF
        return _vir_choice(request.vir)


def _vir_choice(vir: VirOptions) -> VirChoice:
    if vir.mode not in _MODES:
        raise InvalidRequest("vir.mode must be OFF, AUTO or FORCE64", param="vir.mode")
    mode = _MODES[vir.mode]
    if mode != "auto":
        return VirChoice(mode)
    if vir.scope not in _SCOPES:
        raise InvalidRequest("vir.scope must be REQUEST, IMAGE or ABSOLUTE", param="vir.scope")
    for name in ("relative_threshold", "absolute_threshold"):
        if not 0 <= getattr(vir, name) <= 1:  # also refuses NaN
            raise InvalidRequest(f"vir.{name} must be from 0 to 1", param=f"vir.{name}")
    scope = _SCOPES[vir.scope]
    if scope == "request":
        _check_scores(vir.request_scores)
    scores = tuple(vir.request_scores) if scope == "request" else ()
    return VirChoice(mode, scope, vir.relative_threshold, vir.absolute_threshold, scores)


def _check_scores(scores: RepeatedScalarFieldContainer[float]) -> None:
    if not 1 <= len(scores) <= _MAX_REQUEST_SCORES or not all(map(math.isfinite, scores)):
        raise InvalidRequest(
            f"scope REQUEST needs 1 to {_MAX_REQUEST_SCORES} finite request_scores", param="vir.request_scores"
        )


def _dtype(dtype: int) -> FeatureDtypeName:
    if dtype not in _WIRE_DTYPE:
        raise InvalidRequest("dtype must be BFLOAT16 or FLOAT32", param="dtype")
    return _WIRE_DTYPE[dtype]


def _check_length(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise InvalidRequest(f"{name} must have {size} bytes", param=name)
