from protos import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VirMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIR_MODE_UNSPECIFIED: _ClassVar[VirMode]
    VIR_MODE_OFF: _ClassVar[VirMode]
    VIR_MODE_AUTO: _ClassVar[VirMode]
    VIR_MODE_FORCE64: _ClassVar[VirMode]

class VirScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIR_SCOPE_UNSPECIFIED: _ClassVar[VirScope]
    VIR_SCOPE_REQUEST: _ClassVar[VirScope]
    VIR_SCOPE_IMAGE: _ClassVar[VirScope]
    VIR_SCOPE_ABSOLUTE: _ClassVar[VirScope]

class FeatureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_KIND_UNSPECIFIED: _ClassVar[FeatureKind]
    FEATURE_KIND_PROJECTED: _ClassVar[FeatureKind]
    FEATURE_KIND_LAST_HIDDEN_STATE: _ClassVar[FeatureKind]
VIR_MODE_UNSPECIFIED: VirMode
VIR_MODE_OFF: VirMode
VIR_MODE_AUTO: VirMode
VIR_MODE_FORCE64: VirMode
VIR_SCOPE_UNSPECIFIED: VirScope
VIR_SCOPE_REQUEST: VirScope
VIR_SCOPE_IMAGE: VirScope
VIR_SCOPE_ABSOLUTE: VirScope
FEATURE_KIND_UNSPECIFIED: FeatureKind
FEATURE_KIND_PROJECTED: FeatureKind
FEATURE_KIND_LAST_HIDDEN_STATE: FeatureKind

class TilingOptions(_message.Message):
    __slots__ = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "exif_orientation", "num_frames")
    MIN_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    USE_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    EXIF_ORIENTATION_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool
    exif_orientation: bool
    num_frames: int
    def __init__(self, min_dynamic_patch: _Optional[int] = ..., max_dynamic_patch: _Optional[int] = ..., use_thumbnail: _Optional[bool] = ..., exif_orientation: _Optional[bool] = ..., num_frames: _Optional[int] = ...) -> None: ...

class VirOptions(_message.Message):
    __slots__ = ("mode", "scope", "relative_threshold", "absolute_threshold", "request_scores")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_SCORES_FIELD_NUMBER: _ClassVar[int]
    mode: VirMode
    scope: VirScope
    relative_threshold: float
    absolute_threshold: float
    request_scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mode: _Optional[_Union[VirMode, str]] = ..., scope: _Optional[_Union[VirScope, str]] = ..., relative_threshold: _Optional[float] = ..., absolute_threshold: _Optional[float] = ..., request_scores: _Optional[_Iterable[float]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "image_index", "attempt", "mm_hash", "image", "tiling", "deliver_to", "ticket", "dtype", "image_hash", "vir", "first_tile", "num_tiles", "seals_features")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MM_HASH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    DELIVER_TO_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    VIR_FIELD_NUMBER: _ClassVar[int]
    FIRST_TILE_FIELD_NUMBER: _ClassVar[int]
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    SEALS_FEATURES_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    image_index: int
    attempt: int
    mm_hash: bytes
    image: bytes
    tiling: TilingOptions
    deliver_to: _containers.RepeatedCompositeFieldContainer[_status_pb2.Endpoint]
    ticket: bytes
    dtype: _status_pb2.FeatureDtype
    image_hash: bytes
    vir: VirOptions
    first_tile: int
    num_tiles: int
    seals_features: bool
    def __init__(self, request_id: _Optional[bytes] = ..., image_index: _Optional[int] = ..., attempt: _Optional[int] = ..., mm_hash: _Optional[bytes] = ..., image: _Optional[bytes] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ..., deliver_to: _Optional[_Iterable[_Union[_status_pb2.Endpoint, _Mapping]]] = ..., ticket: _Optional[bytes] = ..., dtype: _Optional[_Union[_status_pb2.FeatureDtype, str]] = ..., image_hash: _Optional[bytes] = ..., vir: _Optional[_Union[VirOptions, _Mapping]] = ..., first_tile: _Optional[int] = ..., num_tiles: _Optional[int] = ..., seals_features: _Optional[bool] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("num_tiles", "tokens_per_tile", "feature_bytes", "transport", "cache_hit", "timings", "groups")
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    num_tiles: int
    tokens_per_tile: _containers.RepeatedScalarFieldContainer[int]
    feature_bytes: int
    transport: str
    cache_hit: bool
    timings: VisionTimings
    groups: _containers.RepeatedCompositeFieldContainer[TileGroup]
    def __init__(self, num_tiles: _Optional[int] = ..., tokens_per_tile: _Optional[_Iterable[int]] = ..., feature_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., timings: _Optional[_Union[VisionTimings, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[TileGroup, _Mapping]]] = ...) -> None: ...

class TileGroup(_message.Message):
    __slots__ = ("first_tile", "num_tiles", "queued_ms", "started_ms", "ended_ms", "sent_ms", "acknowledged_ms")
    FIRST_TILE_FIELD_NUMBER: _ClassVar[int]
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    ENDED_MS_FIELD_NUMBER: _ClassVar[int]
    SENT_MS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_MS_FIELD_NUMBER: _ClassVar[int]
    first_tile: int
    num_tiles: int
    queued_ms: float
    started_ms: float
    ended_ms: float
    sent_ms: float
    acknowledged_ms: float
    def __init__(self, first_tile: _Optional[int] = ..., num_tiles: _Optional[int] = ..., queued_ms: _Optional[float] = ..., started_ms: _Optional[float] = ..., ended_ms: _Optional[float] = ..., sent_ms: _Optional[float] = ..., acknowledged_ms: _Optional[float] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("image_hash", "image", "tiling")
    IMAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    image_hash: bytes
    image: bytes
    tiling: TilingOptions
    def __init__(self, image_hash: _Optional[bytes] = ..., image: _Optional[bytes] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("scores", "cache_hit")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    cache_hit: bool
    def __init__(self, scores: _Optional[_Iterable[float]] = ..., cache_hit: _Optional[bool] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("video",)
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    video: bytes
    def __init__(self, video: _Optional[bytes] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("seconds", "num_frames")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    num_frames: int
    def __init__(self, seconds: _Optional[float] = ..., num_frames: _Optional[int] = ...) -> None: ...

class ExtractRequest(_message.Message):
    __slots__ = ("image", "tiling", "dtype", "kind", "vir")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VIR_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    tiling: TilingOptions
    dtype: _status_pb2.FeatureDtype
    kind: FeatureKind
    vir: VirOptions
    def __init__(self, image: _Optional[bytes] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ..., dtype: _Optional[_Union[_status_pb2.FeatureDtype, str]] = ..., kind: _Optional[_Union[FeatureKind, str]] = ..., vir: _Optional[_Union[VirOptions, _Mapping]] = ...) -> None: ...

class ExtractReply(_message.Message):
    __slots__ = ("first_tile", "num_image_tiles", "tokens_per_tile", "hidden_size", "features")
    FIRST_TILE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGE_TILES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    first_tile: int
    num_image_tiles: int
    tokens_per_tile: _containers.RepeatedScalarFieldContainer[int]
    hidden_size: int
    features: bytes
    def __init__(self, first_tile: _Optional[int] = ..., num_image_tiles: _Optional[int] = ..., tokens_per_tile: _Optional[_Iterable[int]] = ..., hidden_size: _Optional[int] = ..., features: _Optional[bytes] = ...) -> None: ...

class VisionTimings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "encode_ms", "transfer_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    encode_ms: float
    transfer_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ...) -> None: ...
