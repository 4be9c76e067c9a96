"""Protobuf messages with some fields changed: numbers at their bounds, text of all kinds, fields gone, twice or new.

Knows the types of fields from their descriptors and nothing of what they mean.
"""

import math
import random
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

_UNSIGNED_32: Final = (0, 1, 2, 3, 15, 16, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
_SIGNED_32: Final = (0, 1, -1, 2, 127, -128, 2**31 - 1, -(2**31))
_SIGNED_64: Final = (0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63))
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e-45, 1e-30, 1e30, 3.4e38, math.inf, -math.inf, math.nan)
_TEXTS: Final = (
    *("", " ", "user", "system", "robot", "\0", "\n", "\u202e\u05d0", "\U0001f600", "x" * 300, "<img>", "</img>"),
    *("<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>system\n", "a*" * 30, "(a+)+b", "[", "{", '{"type": "object"}'),
    *('{"$ref": "#"}', "[" * 5000, "zmq", "grpc", "shm", "tcp", "tcp://127.0.0.1:1", "ipc:///nowhere", "127.0.0.1:1"),
    *("../../etc/passwd", "unix:/nowhere", "\ufeff", "%s%n"),
)
_BYTES: Final = (
    b"",
    b"\0",
    bytes(16),
    bytes(31),
    bytes(32),
    b"r" * 16,
    b"\xff" * 32,
    b"\x89PNG\r\n\x1a\n",
    bytes(5000),
)
_OF_TYPE: Final[dict[int, tuple[Any, ...]]] = {
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 3, 99, -1),
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_INT32: _SIGNED_32,
    FieldDescriptor.TYPE_INT64: _SIGNED_64,
    FieldDescriptor.TYPE_SINT32: _SIGNED_32,
    FieldDescriptor.TYPE_STRING: _TEXTS,
    FieldDescriptor.TYPE_UINT32: _UNSIGNED_32,
}


def mutated(message: MessageT, rng: random.Random) -> MessageT:
    """A copy with one to four changes."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        _change(copy, rng)
    return copy


def _change(message: Message, rng: random.Random) -> None:
    """One, somewhere inside."""
    fields: list[FieldDescriptor] = list(message.DESCRIPTOR.fields)  # type: ignore[arg-type]
    field = rng.choice(fields)
    value = getattr(message, field.name)
    if _is_map(field):
        value[rng.choice(_UNSIGNED_32)] = rng.choice(_FLOATS)
    elif field.is_repeated:
        _change_items(field, value, rng)
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None:
        value.SetInParent()
        _change(value, rng)
    else:
        setattr(message, field.name, rng.choice(_OF_TYPE[field.type]))


def _change_items(field: FieldDescriptor, items: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0 and items:
        del items[rng.randrange(len(items))]
    elif kind == 1 and items:
        items.extend([items[rng.randrange(len(items))]] * rng.choice((1, 2, 300)))
    elif field.message_type is None:
        items.append(rng.choice(_OF_TYPE[field.type]))
    else:
        _change(items[rng.randrange(len(items))] if items and kind > 2 else items.add(), rng)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
