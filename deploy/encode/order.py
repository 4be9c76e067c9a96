"""What is asked of every image: the caller's options over those of the checkpoint, in the words of the wire."""

import json
from dataclasses import dataclass
from typing import Final, Self

from common.model.geometry import Tiling, choose_grid, count_tiles
from common.service.errors import ConfigError
from deploy.encode.settings import EncodeSettings
from protos.frame import ITEM_SIZE, FeatureDtypeName
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16, FEATURE_DTYPE_FLOAT32, FeatureDtype, ModelInfo
from protos.vision_pb2 import (
    FEATURE_KIND_LAST_HIDDEN_STATE,
    FEATURE_KIND_PROJECTED,
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    ExtractRequest,
    FeatureKind,
    TilingOptions,
    VirMode,
    VirOptions,
    VirScope,
)

_KINDS: Final[dict[str, FeatureKind]] = {
    "projected": FEATURE_KIND_PROJECTED,
    "last_hidden_state": FEATURE_KIND_LAST_HIDDEN_STATE,
}
_DTYPES: Final[dict[FeatureDtypeName, FeatureDtype]] = {
    "bfloat16": FEATURE_DTYPE_BFLOAT16,
    "float32": FEATURE_DTYPE_FLOAT32,
}
_MODES: Final[dict[str, VirMode]] = {"off": VIR_MODE_OFF, "auto": VIR_MODE_AUTO, "force64": VIR_MODE_FORCE64}
# An image is a request of its own here.
_SCOPES: Final[dict[str, VirScope]] = {
    "request": VIR_SCOPE_IMAGE,
    "image": VIR_SCOPE_IMAGE,
    "absolute": VIR_SCOPE_ABSOLUTE,
}


@dataclass(frozen=True, slots=True)
class Order:
    """Checked against the model. ``vir`` None: every tile has all its tokens."""

    kind: str
    dtype: FeatureDtypeName
    tiling: Tiling
    exif_orientation: bool
    vir: VirOptions | None

    @classmethod
    def make(cls, settings: EncodeSettings, model: ModelInfo) -> Self:
        """Raises ConfigError for what this model cannot do."""
        vir = _vir(settings, model)
        return cls(settings.kind, settings.dtype, _tiling(settings, model), settings.exif_orientation, vir)

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return ITEM_SIZE[self.dtype]

    @property
    def is_projected(self) -> bool:
        return self.kind == "projected"

    def request(self, image: bytes) -> ExtractRequest:
        tiling = TilingOptions(
            min_dynamic_patch=self.tiling.min_tiles,
            max_dynamic_patch=self.tiling.max_tiles,
            use_thumbnail=self.tiling.use_thumbnail,
            exif_orientation=self.exif_orientation,
        )
        return ExtractRequest(
            image=image, tiling=tiling, dtype=_DTYPES[self.dtype], kind=_KINDS[self.kind], vir=self.vir
        )

    def num_tiles(self, width: int, height: int) -> int:
        """Thumbnail included."""
        return count_tiles(width, height, self.tiling)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows, thumbnail not counted."""
        tiling = self.tiling
        if not tiling.dynamic:
            return 1, 1
        return choose_grid(width, height, tiling.min_tiles, tiling.max_tiles, tiling.tile_size)

    def metadata(self) -> dict[str, str]:
        """For whoever reads the file."""
        tiling = {
            "min_dynamic_patch": self.tiling.min_tiles,
            "max_dynamic_patch": self.tiling.max_tiles,
            "use_thumbnail": self.tiling.use_thumbnail,
            "dynamic_image_size": self.tiling.dynamic,
            "image_size": self.tiling.tile_size,
            "exif_orientation": self.exif_orientation,
        }
        said = {"kind": self.kind, "dtype": self.dtype, "tiling": json.dumps(tiling)}
        return said if self.vir is None else said | {"vir": json.dumps(_vir_metadata(self.vir))}


def _tiling(settings: EncodeSettings, model: ModelInfo) -> Tiling:
    low = settings.min_dynamic_patch or model.min_dynamic_patch
    high = settings.max_dynamic_patch or model.max_dynamic_patch
    if low > high:
        raise ConfigError(f"tiles of an image: at least {low} and at most {high} are asked for; the model's own"
                          f" limits are {model.min_dynamic_patch} and {model.max_dynamic_patch}")  # fmt: skip
    thumbnail = model.use_thumbnail if settings.thumbnail is None else settings.thumbnail
    return Tiling(low, high, thumbnail, model.image_size, model.dynamic_image_size)


def _vir(settings: EncodeSettings, model: ModelInfo) -> VirOptions | None:
    if not model.is_flash or settings.kind != "projected":
        _check_not_wished(settings, "a Flash model" if not model.is_flash else "--kind projected")
        return None
    relative, absolute = settings.vir_relative_threshold, settings.vir_absolute_threshold
    return VirOptions(
        mode=_MODES[settings.vir_mode],
        scope=_SCOPES[settings.vir_scope],
        relative_threshold=model.vir_relative_threshold if relative is None else relative,
        absolute_threshold=model.vir_absolute_threshold if absolute is None else absolute,
    )


def _check_not_wished(settings: EncodeSettings, what: str) -> None:
    """Where nothing is compressed the words that say so are welcome, as they are in a request to the router."""
    wishes = {
        "--vir-mode force64": settings.vir_mode == "force64",
        "--vir-relative-threshold": settings.vir_relative_threshold is not None,
        "--vir-absolute-threshold": settings.vir_absolute_threshold is not None,
    }
    for flag, is_wished in wishes.items():
        if is_wished:
            raise ConfigError(f"{flag} needs {what}")


def _vir_metadata(vir: VirOptions) -> dict[str, str | float]:
    mode = next(name for name, value in _MODES.items() if value == vir.mode)
    if mode != "auto":
        return {"mode": mode}
    absolute = {"absolute_threshold": round(vir.absolute_threshold, 6)}  # a float of 32 bits
    if vir.scope == VIR_SCOPE_ABSOLUTE:
        return {"mode": mode, "scope": "absolute", **absolute}
    return {"mode": mode, "scope": "image", "relative_threshold": round(vir.relative_threshold, 6), **absolute}
