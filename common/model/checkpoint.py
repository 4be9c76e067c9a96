"""From files to parameters: reads one role's tensors of a checkpoint, and nothing else, into memory already allocated.

A tensor on disk fills a view of one parameter: all of it, a third of a fused qkv, or one expert's half of a fused
gate_up_proj. Bytes go from the file straight into the parameter, or, where dtype or device differ, through one
small staging buffer. So loading needs the role's weights in memory and a constant more, whatever the checkpoint's size.
FP8 weights become what the parameter is, by their scales, unless the parameter is FP8 itself.

Accepts InternVL's own names, those of transformers in memory (``model.language_model.*``) and those it writes to disk
(``language_model.model.*``). Never runs code from a checkpoint.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import torch
from blake3 import blake3

from common.model import fp8
from common.model.config import InternVLConfig, Layout
from common.model.names import WHOLE, Part, Role, is_unused, locate, name_of_part, name_on_disk
from common.model.shards import Shard, TensorEntry, read_shards
from common.service.errors import CheckpointError

__all__ = ["Checkpoint", "Role", "load_role", "locate"]

STAGING_BYTES: Final = 16 * 1024 * 1024
FINGERPRINT_BYTES: Final = 16
_SAMPLE_BYTES: Final = 4096
_MAX_READ_BYTES: Final = 1 << 30
"""Linux moves at most 2 GiB in one call."""
_LONG_RUN_BYTES: Final = 64 * 1024
_RUNS_BYTES: Final = 4 * 1024 * 1024
"""Of cut tensors: runs shorter than the one are read together, in spans of at most the other."""

_TORCH_DTYPE: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": fp8.DTYPE,
}
_SCALE_DTYPES: Final = ("F32", "BF16", "F16")


class Checkpoint:
    """An open checkpoint folder: what is in it, and how much of it has been read so far.

    Attributes:
        entries: every tensor by its name on disk.
        header_bytes_read: bytes of headers (and fingerprint samples) read.
        tensor_bytes_read: bytes of tensors read.
    """

    def __init__(self, path: Path, shards: tuple[Shard, ...]) -> None:
        self.path = path
        self.entries: Mapping[str, TensorEntry] = {entry.name: entry for shard in shards for entry in shard.entries}
        self.header_bytes_read = sum(shard.header_bytes for shard in shards)
        self.tensor_bytes_read = 0
        self.shards = shards

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the headers. Raises CheckpointError for anything but a sound safetensors checkpoint."""
        return cls(path, read_shards(path))

    @property
    def bytes_read(self) -> int:
        return self.header_bytes_read + self.tensor_bytes_read

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def open_shard(self, name: str) -> BinaryIO:
        """A shard's file for unbuffered reading. Raises CheckpointError if it has gone."""
        try:
            return open(self.path / name, "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"shard {name!r} cannot be opened ({type(error).__name__})") from error

    def fingerprint(self, config: InternVLConfig) -> bytes:
        """16 bytes that differ between checkpoints: BLAKE3 of config, tensor table and both ends of every shard.

        Cheap enough for every start, and equal on all servers of one checkpoint whatever their role.
        """
        digest = blake3(json.dumps(asdict(config), sort_keys=True).encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"\n{name} {entry.dtype} {entry.shape}".encode())
        for shard in self.shards:
            with self.open_shard(shard.name) as file:
                head = file.read(_SAMPLE_BYTES)
                file.seek(max(0, shard.file_bytes - _SAMPLE_BYTES))
                tail = file.read(_SAMPLE_BYTES)
            digest.update(head + tail)
            self.header_bytes_read += len(head) + len(tail)
        return digest.digest(length=FINGERPRINT_BYTES)


class RowSink(Protocol):
    """Holds a matrix in a form of its own, such as quantised. Gets it from top to bottom."""

    row_multiple: int
    """Rows come in multiples of it, but for the last ones."""

    def put(self, first_row: int, rows: torch.Tensor) -> None:
        """Take ``rows`` [num_rows, columns], which lie in host memory only during the call, in any float dtype."""
        ...


@dataclass(frozen=True, slots=True)
class _Scales:
    """What FP8 values have to be multiplied with, and how many share one."""

    entry: TensorEntry
    block: fp8.Block


@dataclass(frozen=True, slots=True)
class _Read:
    """One transfer: ``entry`` on disk into ``destination``, a view of ``parameter``; or into ``sink`` instead."""

    entry: TensorEntry
    parameter: str
    part: Part
    destination: torch.Tensor
    scales: _Scales | None = None
    sink: RowSink | None = None

    @property
    def num_bytes(self) -> int:
        return self.entry.num_bytes + (0 if self.scales is None else self.scales.entry.num_bytes)


def load_role(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    role: Role,
    parameters: Mapping[str, torch.Tensor],
    *,
    sinks: Mapping[str, RowSink] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill ``parameters`` in place with the tensors of ``role``, converted to each parameter's dtype and device.

    Args:
        parameters: contiguous tensors by canonical name: InternVL's own names for vision (``vision_model.*`` with
            fused ``attn.qkv``, ``mlp1.*``, Flash modules where built), those of transformers' ``*ForCausalLM`` for
            language. A tied ``lm_head.weight`` may be absent or share memory with the embedding. An FP8 parameter
            takes FP8 values as they are, and its scales are a parameter of their own.
        sinks: by parameter, which says what shape to expect but is left alone.
        progress: called with bytes done and bytes in all, after each tensor.

    Raises:
        CheckpointError: naming tensor, shard, expected and found, before the first byte of a tensor is read: for
            missing, unknown, repeated and mis-shaped tensors; while reading for a file that has shrunk.
    """
    with torch.no_grad():
        reads = _plan(checkpoint, config, role, parameters, sinks or {})
        _check_complete(checkpoint, config, role, parameters, reads)
        _execute(checkpoint, reads, progress)
        _copy_tied_head(parameters, reads)


def _plan(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    role: Role,
    parameters: Mapping[str, torch.Tensor],
    sinks: Mapping[str, RowSink],
) -> list[_Read]:
    """What to read for ``role``, in the order in which it lies on disk."""
    reads: list[_Read] = []
    for entry in checkpoint.entries.values():
        tensor_role, name, part = locate(entry.name)
        if tensor_role is None:
            raise CheckpointError(
                f"tensor {entry.name!r} in shard {entry.shard!r} is of no known part of an InternVL model"
            )
        if tensor_role != role or is_unused(name, parameters):
            continue
        if name not in parameters and are_scales(entry, checkpoint.entries):
            continue  # of a weight, which is read with them
        destination, sink = _destination(entry, name, part, parameters), sinks.get(name)
        scales = _scales_for(entry, destination, sink, checkpoint, config)
        reads.append(_Read(entry, name, part, destination, scales, sink))
    return sorted(reads, key=lambda read: (read.entry.shard, read.entry.offset))


def _destination(entry: TensorEntry, name: str, part: Part, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    where = f"tensor {entry.name!r} in shard {entry.shard!r}"
    parameter = parameters.get(name)
    if parameter is None:
        hint = "; MXFP4 is not supported, use a BF16 checkpoint" if name.endswith(("_blocks", "_scales")) else ""
        raise CheckpointError(f"{where} is extra: the model has no parameter {name!r}{hint}")
    if part.expert is not None and part.expert >= parameter.shape[0]:
        raise CheckpointError(f"{where} is extra: expected {parameter.shape[0]} experts, found expert {part.expert}")
    if not parameter.is_contiguous() or parameter.is_meta:
        raise ValueError(f"parameter {name!r} must be allocated and contiguous")
    view = _view(parameter.detach(), part)
    if tuple(view.shape) != entry.shape:
        raise CheckpointError(f"{where}: expected shape {list(view.shape)}, found {list(entry.shape)}")
    if entry.dtype not in _TORCH_DTYPE:
        raise CheckpointError(f"{where}: expected one of {', '.join(_TORCH_DTYPE)}, found {entry.dtype}")
    return view


def are_scales(entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a tensor holds the scales of an FP8 weight beside it."""
    weight = entries.get(entry.name.removesuffix(fp8.SCALE_SUFFIX))
    return weight is not None and weight is not entry and weight.dtype == "F8_E4M3"


def _scales_for(
    entry: TensorEntry,
    destination: torch.Tensor,
    sink: RowSink | None,
    checkpoint: Checkpoint,
    config: InternVLConfig,
) -> _Scales | None:
    """What turns FP8 values on disk into numbers, or None where none are needed. Raises CheckpointError without."""
    is_fp8, where = entry.dtype == "F8_E4M3", f"tensor {entry.name!r} in shard {entry.shard!r}"
    if sink is None and destination.dtype == fp8.DTYPE:
        if not is_fp8:
            raise CheckpointError(f"{where}: expected F8_E4M3, found {entry.dtype}")
        return None
    if not is_fp8:
        return None
    if config.fp8_block is None:
        raise CheckpointError(f"{where}: FP8, but config.json has no quantization_config with quant_method fp8")
    scales = checkpoint.entries.get(entry.name + fp8.SCALE_SUFFIX)
    if scales is None:
        raise CheckpointError(f"{where}: FP8, but its scales {entry.name + fp8.SCALE_SUFFIX!r} are missing")
    if len(entry.shape) != 2:
        raise CheckpointError(f"{where}: FP8 is read as matrices only, found shape {list(entry.shape)}")
    where = f"tensor {scales.name!r} in shard {scales.shard!r}"
    expected = fp8.scale_shape(*entry.shape, config.fp8_block)
    if scales.shape != expected:
        raise CheckpointError(f"{where}: expected shape {list(expected)}, found {list(scales.shape)}")
    if scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(f"{where}: expected one of {', '.join(_SCALE_DTYPES)}, found {scales.dtype}")
    return _Scales(scales, config.fp8_block)


def _view(parameter: torch.Tensor, part: Part) -> torch.Tensor:
    if part.expert is not None:
        parameter = parameter[part.expert]
    return parameter if part.num_slots == 1 else parameter.chunk(part.num_slots)[part.slot]


def _check_complete(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    role: Role,
    parameters: Mapping[str, torch.Tensor],
    reads: list[_Read],
) -> None:
    by_parameter: dict[str, dict[Part, TensorEntry]] = {}
    for read in reads:
        parts = by_parameter.setdefault(read.parameter, {})
        if read.part in parts or (parts and WHOLE in (read.part, *parts)):
            other = next(iter(parts.values()))
            raise CheckpointError(
                f"tensor {read.entry.name!r} in shard {read.entry.shard!r}: the same parameter is also stored as "
                f"{other.name!r} in shard {other.shard!r}"
            )
        parts[read.part] = read.entry
    for name, parameter in parameters.items():
        parts = by_parameter.get(name, {})
        if name == "lm_head.weight" and not parts and config.tie_word_embeddings:
            continue
        for missing in _missing_names(name, parameter, parts, config.layout):
            raise CheckpointError(
                f"{role} tensor {missing!r} is missing: expected for parameter {name!r} {list(parameter.shape)}, "
                f"found in none of {checkpoint.num_shards} shards"
            )


def _missing_names(
    name: str, parameter: torch.Tensor, parts: Mapping[Part, TensorEntry], layout: Layout
) -> Iterator[str]:
    """Names on disk of the tensors that ``parameter`` still lacks."""
    if not parts:
        yield name_on_disk(name, layout)
        return
    example_part, example = next(iter(parts.items()))
    experts = [None] if example_part.expert is None else range(parameter.shape[0])
    for expert in experts:
        for slot in range(example_part.num_slots):
            if Part(slot, example_part.num_slots, expert) not in parts:
                yield name_of_part(example.name, slot, expert)


def _execute(checkpoint: Checkpoint, reads: list[_Read], progress: Callable[[int, int], None] | None) -> None:
    total = sum(read.num_bytes for read in reads)
    done = 0
    staging: torch.Tensor | None = None
    with ExitStack() as files:
        descriptors: dict[str, int] = {}

        def descriptor(entry: TensorEntry) -> int:
            if entry.shard not in descriptors:
                descriptors[entry.shard] = files.enter_context(checkpoint.open_shard(entry.shard)).fileno()
            return descriptors[entry.shard]

        for read in reads:
            if read.scales is not None or read.sink is not None:
                _read_rows(read, descriptor)
            elif _is_direct(read):
                _read_exactly(descriptor(read.entry), read.entry, 0, _bytes_of(read.destination))
            else:
                staging = staging if staging is not None else torch.empty(STAGING_BYTES, dtype=torch.uint8)
                _read_staged(descriptor(read.entry), read, staging)
            checkpoint.tensor_bytes_read += read.num_bytes
            done += read.num_bytes
            if progress is not None:
                progress(done, total)


def _is_direct(read: _Read) -> bool:
    return read.destination.device.type == "cpu" and read.destination.dtype == _TORCH_DTYPE[read.entry.dtype]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_staged(descriptor: int, read: _Read, staging: torch.Tensor) -> None:
    """Read chunk by chunk through ``staging``, converting dtype and device on the way."""
    dtype = _TORCH_DTYPE[read.entry.dtype]
    flat = read.destination.view(-1)
    chunk = staging.numel() // dtype.itemsize
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        source = staging[: part.numel() * dtype.itemsize]
        _read_exactly(descriptor, read.entry, start * dtype.itemsize, _bytes_of(source))
        part.copy_(source.view(dtype))


def _read_rows(read: _Read, descriptor: Callable[[TensorEntry], int]) -> None:
    """Whole rows at a time. As float32, of which several may exist at once, they take a quarter of what is staged."""
    entry, scales = read.entry, None if read.scales is None else _read_scales(read, descriptor)
    num_rows, columns = entry.shape
    multiple = 1 if read.sink is None else read.sink.row_multiple
    step = max(1, STAGING_BYTES // (16 * columns * multiple)) * multiple
    buffer = torch.empty(min(step, num_rows), columns, dtype=_TORCH_DTYPE[entry.dtype])
    for first in range(0, num_rows, step):
        rows = buffer[: num_rows - first]
        _read_exactly(descriptor(entry), entry, first * columns * buffer.itemsize, _bytes_of(rows))
        if read.scales is not None and scales is not None:
            rows = fp8.dequantize(rows.to(scales.device), scales, read.scales.block, first_row=first)
        if read.sink is None:
            read.destination[first : first + len(rows)].copy_(rows)
        else:
            read.sink.put(first, rows)


def _read_scales(read: _Read, descriptor: Callable[[TensorEntry], int]) -> torch.Tensor:
    """float32 where the weight goes: multiplied there, half or a quarter of the bytes have to be moved."""
    assert read.scales is not None  # asked for only where there are some
    entry = read.scales.entry
    scales = torch.empty(entry.shape, dtype=_TORCH_DTYPE[entry.dtype])
    _read_exactly(descriptor(entry), entry, 0, _bytes_of(scales))
    return scales.to(read.destination.device, torch.float32)


def _read_exactly(descriptor: int, entry: TensorEntry, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from byte ``start`` of the tensor. Positional reads leave no mapped pages in our memory."""
    if entry.run_bytes is None:
        _read_piece(descriptor, entry, start, buffer)
        return
    done = 0
    while done < len(buffer):
        done += _read_runs(descriptor, entry, entry.run_bytes, start + done, buffer[done:])


def _read_runs(descriptor: int, entry: TensorEntry, run_bytes: int, start: int, buffer: memoryview) -> int:
    """Read one run of a cut tensor, or several short ones with what lies between them; returns the bytes filled.

    A call for each short run would take longer than reading what is not needed.
    """
    index, within = divmod(start, run_bytes)
    is_long = run_bytes >= _LONG_RUN_BYTES or within > 0
    count = 1 if is_long else min(len(buffer) // run_bytes, _RUNS_BYTES // entry.pitch_bytes)
    if count <= 1:
        size = min(run_bytes - within, len(buffer))
        _read_piece(descriptor, entry, index * entry.pitch_bytes + within, buffer[:size])
        return size
    window = torch.empty(count, entry.pitch_bytes, dtype=torch.uint8)
    span = (count - 1) * entry.pitch_bytes + run_bytes
    _read_piece(descriptor, entry, index * entry.pitch_bytes, _bytes_of(window)[:span])
    target = torch.frombuffer(buffer, dtype=torch.uint8, count=count * run_bytes)
    target.view(count, run_bytes).copy_(window[:, :run_bytes])
    return count * run_bytes


def _read_piece(descriptor: int, entry: TensorEntry, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from the file, ``start`` bytes behind the tensor's first."""
    done = 0
    while done < len(buffer):
        window = buffer[done : done + _MAX_READ_BYTES]
        try:
            count = os.preadv(descriptor, [window], entry.offset + start + done)
        except OSError as error:
            raise CheckpointError(
                f"tensor {entry.name!r} in shard {entry.shard!r} cannot be read ({type(error).__name__})"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"tensor {entry.name!r} in shard {entry.shard!r} is truncated: expected {entry.num_bytes} bytes, "
                f"found {start + done}; download the shard again"
            )
        done += count


def _copy_tied_head(parameters: Mapping[str, torch.Tensor], reads: list[_Read]) -> None:
    """A head that is tied but has its own memory gets the embedding's values."""
    head = parameters.get("lm_head.weight")
    if head is None or any(read.parameter == "lm_head.weight" for read in reads):
        return
    embedding = parameters["model.embed_tokens.weight"]
    if head.data_ptr() != embedding.data_ptr():
        head.copy_(embedding)
