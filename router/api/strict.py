"""Names in a body, however deep, that mean nothing to us: what ``X-Dvd-Strict: 1`` refuses beside those at the top."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct, inspect


def unknown_inside(headers: Mapping[str, str], body: bytes, kind: type[Struct]) -> list[str]:
    """Paths of such names below the top of a body that was read as a ``kind``; none where nobody asks, since all of it
    is read again. ``null`` means "not given" here, too."""
    if headers.get("x-dvd-strict") != "1":
        return []
    described = _describe(kind)
    fields = {each.encode_name: each.type for each in described.fields}
    value = msgspec.json.decode(body)
    return [path for name in fields.keys() & value.keys() for path in _unknown(value[name], fields[name], name)]


@cache
def _describe(kind: type[Struct]) -> inspect.StructType:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return described


def _unknown(value: Any, kind: inspect.Type, path: str) -> Iterator[str]:
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    for each in kinds:
        if isinstance(each, inspect.ListType) and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _unknown(item, each.item_type, f"{path}[{index}]")
        elif isinstance(each, inspect.StructType) and isinstance(value, dict):
            fields = {known.encode_name: known.type for known in each.fields}
            for name, item in value.items():
                if name in fields:
                    yield from _unknown(item, fields[name], f"{path}.{name}")
                elif item is not None:
                    yield f"{path}.{name}"
