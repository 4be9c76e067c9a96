"""The safetensors files of a checkpoint: which tensor lies in which file, at which bytes.

Reads headers only, and trusts none of them: sizes are bounded, byte ranges must be disjoint, complete and inside the
file. Needs no tensor library, so that it can be read anywhere. Knows nothing of what a tensor means: see checkpoint.py.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from common.service.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
"""The limit of the safetensors library; about half a million tensors."""

ITEM_SIZE: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor on disk: ``num_bytes`` at ``offset`` from the start of ``shard``; ``dtype`` as safetensors spells it.

    Of a tensor that was cut (cuts.py) they are runs of ``run_bytes``, each ``pitch_bytes`` behind the one before.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    run_bytes: int | None = None  # None: all in one piece
    pitch_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file and what its header says."""

    name: str
    header_bytes: int
    file_bytes: int
    entries: tuple[TensorEntry, ...]


def read_shards(path: Path) -> tuple[Shard, ...]:
    """Headers of all shards of the checkpoint folder ``path``.

    Raises:
        CheckpointError: if there is no safetensors checkpoint, or index, headers and files do not fit together.
    """
    if (path / SINGLE_FILE).is_file():
        return (_read_shard(path, SINGLE_FILE),)
    weight_map = _read_index(path)
    shards = tuple(_read_shard(path, name) for name in sorted(set(weight_map.values())))
    _check_against_index(shards, weight_map)
    return shards


def tensor_names(path: Path) -> frozenset[str]:
    """Names of all tensors, from the index alone where there is one. Raises as ``read_shards``."""
    if (path / SINGLE_FILE).is_file():
        return frozenset(entry.name for entry in _read_shard(path, SINGLE_FILE).entries)
    return frozenset(_read_index(path))


def has_weights(path: Path) -> bool:
    """Whether there is anything for ``read_shards`` to read."""
    return (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, as the index file lists them."""
    try:
        index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(_no_weights(path)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{INDEX_FILE}: not a readable JSON file ({type(error).__name__})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: no weight_map in it; copy the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{INDEX_FILE}: tensor {name!r}: expected a file name, found {str(shard)[:64]!r}")
    return weight_map


def _no_weights(path: Path) -> str:
    if not path.is_dir():
        return f"no checkpoint folder {path.name!r}"
    if others := sorted(file.name for suffix in ("bin", "pt", "pth", "gguf") for file in path.glob(f"*.{suffix}")):
        return f"found {others[0]!r}, but only safetensors is read (other formats can run code): convert the checkpoint"
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} in {path.name!r}: not a complete checkpoint folder"


def _check_against_index(shards: tuple[Shard, ...], weight_map: Mapping[str, str]) -> None:
    stored = {(entry.name, shard.name) for shard in shards for entry in shard.entries}
    listed = set(weight_map.items())
    for name, shard_name in sorted(listed - stored):
        raise CheckpointError(f"tensor {name!r}: {INDEX_FILE} expects it in shard {shard_name!r}, found none there")
    for name, shard_name in sorted(stored - listed):
        raise CheckpointError(f"tensor {name!r}: found in shard {shard_name!r}, not expected there by {INDEX_FILE}")


def _read_shard(path: Path, name: str) -> Shard:
    try:
        with open(path / name, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
                raise _broken(name, f"header length {length} in a file of {file_bytes} bytes")
            header = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"shard {name!r} is named by {INDEX_FILE} but missing: download it again") from error
    except OSError as error:
        raise CheckpointError(f"shard {name!r} cannot be read ({type(error).__name__})") from error
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _broken(name, "header is not JSON") from error
    if not isinstance(values, dict):
        raise _broken(name, "header is not a JSON object")
    values.pop("__metadata__", None)
    header_bytes = _LENGTH_BYTES + length
    entries = tuple(
        sorted(
            (_read_entry(name, tensor, value, header_bytes) for tensor, value in values.items()),
            key=lambda entry: (entry.offset, entry.num_bytes),
        )
    )
    _check_ranges(name, entries, header_bytes, file_bytes)
    return Shard(name, header_bytes, file_bytes, entries)


def _read_entry(shard: str, name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _broken(shard, f"tensor {name!r} is not described by a JSON object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(f"tensor {name!r} in shard {shard!r}: unsupported dtype {str(dtype)[:64]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(shard, f"tensor {name!r} has no valid shape and data_offsets")
    num_bytes = math.prod(shape) * ITEM_SIZE[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise CheckpointError(
            f"tensor {name!r} in shard {shard!r}: expected {num_bytes} bytes for {dtype} {list(shape)}, "
            f"found {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, shard, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(shard: str, entries: tuple[TensorEntry, ...], data_start: int, file_bytes: int) -> None:
    """The format allows neither holes nor overlaps, so the ranges in order must join up to the end of the file."""
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise _broken(shard, f"tensor {entry.name!r} starts at byte {entry.offset}, expected {position}")
        position += entry.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"tensor {entry.name!r} in shard {shard!r} is truncated: expected {entry.num_bytes} bytes, found "
                f"{max(0, file_bytes - entry.offset)}; download the shard again"
            )
    if position != file_bytes:
        raise _broken(shard, f"expected {position} bytes, found {file_bytes}")


def _broken(shard: str, problem: str) -> CheckpointError:
    return CheckpointError(f"shard {shard!r} is not a sound safetensors file: {problem}; download it again")
