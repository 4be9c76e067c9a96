from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Orders(_message.Message):
    __slots__ = ("begin", "read", "cancel")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    begin: _containers.RepeatedCompositeFieldContainer[Begin]
    read: _containers.RepeatedCompositeFieldContainer[Window]
    cancel: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, begin: _Optional[_Iterable[_Union[Begin, _Mapping]]] = ..., read: _Optional[_Iterable[_Union[Window, _Mapping]]] = ..., cancel: _Optional[_Iterable[int]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("call", "method", "request", "timeout_seconds", "metadata")
    CALL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    call: int
    method: str
    request: bytes
    timeout_seconds: float
    metadata: _containers.RepeatedCompositeFieldContainer[Metadatum]
    def __init__(self, call: _Optional[int] = ..., method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ..., metadata: _Optional[_Iterable[_Union[Metadatum, _Mapping]]] = ...) -> None: ...

class Metadatum(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("call", "num_messages")
    CALL_FIELD_NUMBER: _ClassVar[int]
    NUM_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    call: int
    num_messages: int
    def __init__(self, call: _Optional[int] = ..., num_messages: _Optional[int] = ...) -> None: ...

class Reports(_message.Message):
    __slots__ = ("said",)
    SAID_FIELD_NUMBER: _ClassVar[int]
    said: _containers.RepeatedCompositeFieldContainer[Said]
    def __init__(self, said: _Optional[_Iterable[_Union[Said, _Mapping]]] = ...) -> None: ...

class Said(_message.Message):
    __slots__ = ("call", "messages", "end")
    CALL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    call: int
    messages: _containers.RepeatedScalarFieldContainer[bytes]
    end: End
    def __init__(self, call: _Optional[int] = ..., messages: _Optional[_Iterable[bytes]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("status", "details", "metadata")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    status: int
    details: str
    metadata: _containers.RepeatedCompositeFieldContainer[Metadatum]
    def __init__(self, status: _Optional[int] = ..., details: _Optional[str] = ..., metadata: _Optional[_Iterable[_Union[Metadatum, _Mapping]]] = ...) -> None: ...
