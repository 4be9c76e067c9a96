from protos import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TilingOptions(_message.Message):
    __slots__ = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
    MIN_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    USE_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool
    def __init__(self, min_dynamic_patch: _Optional[int] = ..., max_dynamic_patch: _Optional[int] = ..., use_thumbnail: _Optional[bool] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "image_index", "attempt", "mm_hash", "image", "tiling", "deliver_to", "ticket", "dtype")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MM_HASH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    DELIVER_TO_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    image_index: int
    attempt: int
    mm_hash: bytes
    image: bytes
    tiling: TilingOptions
    deliver_to: _containers.RepeatedCompositeFieldContainer[_status_pb2.Endpoint]
    ticket: bytes
    dtype: _status_pb2.FeatureDtype
    def __init__(self, request_id: _Optional[bytes] = ..., image_index: _Optional[int] = ..., attempt: _Optional[int] = ..., mm_hash: _Optional[bytes] = ..., image: _Optional[bytes] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ..., deliver_to: _Optional[_Iterable[_Union[_status_pb2.Endpoint, _Mapping]]] = ..., ticket: _Optional[bytes] = ..., dtype: _Optional[_Union[_status_pb2.FeatureDtype, str]] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("num_tiles", "tokens_per_tile", "feature_bytes", "transport", "cache_hit", "timings")
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    num_tiles: int
    tokens_per_tile: _containers.RepeatedScalarFieldContainer[int]
    feature_bytes: int
    transport: str
    cache_hit: bool
    timings: VisionTimings
    def __init__(self, num_tiles: _Optional[int] = ..., tokens_per_tile: _Optional[_Iterable[int]] = ..., feature_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., cache_hit: _Optional[bool] = ..., timings: _Optional[_Union[VisionTimings, _Mapping]] = ...) -> None: ...

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
