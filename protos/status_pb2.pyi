from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]

class FeatureDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_DTYPE_UNSPECIFIED: _ClassVar[FeatureDtype]
    FEATURE_DTYPE_BFLOAT16: _ClassVar[FeatureDtype]
    FEATURE_DTYPE_FLOAT32: _ClassVar[FeatureDtype]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
FEATURE_DTYPE_UNSPECIFIED: FeatureDtype
FEATURE_DTYPE_BFLOAT16: FeatureDtype
FEATURE_DTYPE_FLOAT32: FeatureDtype

class Endpoint(_message.Message):
    __slots__ = ("transport", "address")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    address: str
    def __init__(self, transport: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "max_model_len", "image_size", "tokens_per_tile", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "dynamic_image_size", "vocab_size", "default_temperature", "default_top_p", "default_top_k", "default_repetition_penalty", "is_flash", "vir_relative_threshold", "vir_absolute_threshold")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    MIN_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_DYNAMIC_PATCH_FIELD_NUMBER: _ClassVar[int]
    USE_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TOP_P_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TOP_K_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    IS_FLASH_FIELD_NUMBER: _ClassVar[int]
    VIR_RELATIVE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    VIR_ABSOLUTE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    model: str
    max_model_len: int
    image_size: int
    tokens_per_tile: int
    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool
    dynamic_image_size: bool
    vocab_size: int
    default_temperature: float
    default_top_p: float
    default_top_k: int
    default_repetition_penalty: float
    is_flash: bool
    vir_relative_threshold: float
    vir_absolute_threshold: float
    def __init__(self, model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., image_size: _Optional[int] = ..., tokens_per_tile: _Optional[int] = ..., min_dynamic_patch: _Optional[int] = ..., max_dynamic_patch: _Optional[int] = ..., use_thumbnail: _Optional[bool] = ..., dynamic_image_size: _Optional[bool] = ..., vocab_size: _Optional[int] = ..., default_temperature: _Optional[float] = ..., default_top_p: _Optional[float] = ..., default_top_k: _Optional[int] = ..., default_repetition_penalty: _Optional[float] = ..., is_flash: _Optional[bool] = ..., vir_relative_threshold: _Optional[float] = ..., vir_absolute_threshold: _Optional[float] = ...) -> None: ...

class VisionLoad(_message.Message):
    __slots__ = ("queued_tiles", "running_tiles", "max_queued_tiles", "tiles_per_second", "max_batch_tiles")
    QUEUED_TILES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_TILES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TILES_FIELD_NUMBER: _ClassVar[int]
    TILES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TILES_FIELD_NUMBER: _ClassVar[int]
    queued_tiles: int
    running_tiles: int
    max_queued_tiles: int
    tiles_per_second: float
    max_batch_tiles: int
    def __init__(self, queued_tiles: _Optional[int] = ..., running_tiles: _Optional[int] = ..., max_queued_tiles: _Optional[int] = ..., tiles_per_second: _Optional[float] = ..., max_batch_tiles: _Optional[int] = ...) -> None: ...

class LanguageLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "free_kv_blocks", "total_kv_blocks", "free_feature_bytes", "max_num_waiting", "tokens_per_second", "num_preemptions")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_FEATURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    free_kv_blocks: int
    total_kv_blocks: int
    free_feature_bytes: int
    max_num_waiting: int
    tokens_per_second: float
    num_preemptions: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., free_kv_blocks: _Optional[int] = ..., total_kv_blocks: _Optional[int] = ..., free_feature_bytes: _Optional[int] = ..., max_num_waiting: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., num_preemptions: _Optional[int] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("name", "state", "incarnation", "fingerprint", "progress", "model", "metrics_address", "vision", "language")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VISION_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: WorkerState
    incarnation: bytes
    fingerprint: bytes
    progress: int
    model: ModelInfo
    metrics_address: str
    vision: VisionLoad
    language: LanguageLoad
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., incarnation: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ..., progress: _Optional[int] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., metrics_address: _Optional[str] = ..., vision: _Optional[_Union[VisionLoad, _Mapping]] = ..., language: _Optional[_Union[LanguageLoad, _Mapping]] = ...) -> None: ...
