"""A safetensors file that is written image by image, however large it becomes.

The format wants a header with every offset in front, so room for the longest possible one is left, and filled at the
end: blanks behind a header are allowed. Until then the file has another name. Knows nothing of images or servers.
Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import json
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import numpy as np

from common.service.errors import ConfigError, InternalError
from protos.frame import FeatureDtypeName

FEATURES: Final = "features"
TOKENS: Final = "tokens_per_tile"
MAX_HEADER_BYTES: Final = 100_000_000
"""Readers refuse more."""

_DTYPES: Final[dict[FeatureDtypeName, str]] = {"bfloat16": "BF16", "float32": "F32"}
_LARGEST: Final = 10**15
_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor. ``start`` and ``end`` in bytes behind the header."""

    dtype: str
    shape: Sequence[int]
    start: int
    end: int


class FeaturesFile:
    """Tensors ``NAME.features`` and ``NAME.tokens_per_tile`` of each image: ``begin``, ``add`` each, ``finish``.

    A context manager; where ``finish`` was not reached, nothing is left. All methods block on the disk, and raise
    ConfigError where it does not take what is written.
    """

    def __init__(self, path: Path, dtype: FeatureDtypeName) -> None:
        self._path = path
        self._dtype = _DTYPES[dtype]
        self._draft = path
        self._file: BinaryIO | None = None
        self._features: dict[str, _Entry] = {}
        self._tokens: dict[str, Sequence[int]] = {}
        self._header_bytes = 0
        self.num_bytes = 0
        """Of features so far; of the whole file after ``finish``."""

    def __enter__(self) -> Self:
        with self._explained():
            # Not into devices and pipes: a rename would take their place.
            if self._path.exists() and not self._path.is_file():
                raise ConfigError(f"--output {self._path}: exists and is no file")
            self._draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
            self._file = open(self._draft, "xb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what a full disk did not take; the file is removed anyway
                self._file.close()
            self._draft.unlink(missing_ok=True)

    def begin(self, names: Iterable[str], metadata: Mapping[str, str], num_dimensions: int) -> None:
        """Leave room for the header. At most these names and this metadata may come, with features of so many
        dimensions."""
        features = {name: _Entry(self._dtype, [_LARGEST] * num_dimensions, _LARGEST, _LARGEST) for name in names}
        tokens = {name: _Entry("I32", [_LARGEST], _LARGEST, _LARGEST) for name in features}
        longest = _header(metadata, features, tokens)
        self._header_bytes = -(-len(longest) // _ALIGNMENT) * _ALIGNMENT
        if self._header_bytes > MAX_HEADER_BYTES:
            most = len(features) * MAX_HEADER_BYTES // self._header_bytes
            raise ConfigError(f"{len(features)} images are too many for one file: about {most} names fit into a header")
        with self._explained():
            self._opened.seek(8 + self._header_bytes)

    def add(self, name: str, shape: Sequence[int], parts: Sequence[bytes], tokens_per_tile: Sequence[int]) -> None:
        """The features of one image, row-major little-endian, in one piece or several."""
        size = sum(map(len, parts))
        if size % 4:  # never with an even hidden size
            raise InternalError(f"features of shape {list(shape)} would leave what follows unaligned")
        with self._explained():
            self._opened.writelines(parts)
        self._features[name] = _Entry(self._dtype, shape, self.num_bytes, self.num_bytes + size)
        self._tokens[name] = tokens_per_tile
        self.num_bytes += size

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Complete the file and give it its name."""
        tokens: dict[str, _Entry] = {}
        with self._explained():
            for name, counts in self._tokens.items():
                data = np.asarray(counts, dtype="<i4").tobytes()
                tokens[name] = _Entry("I32", [len(counts)], self.num_bytes, self.num_bytes + len(data))
                self._opened.write(data)
                self.num_bytes += len(data)
            header = _header(metadata, self._features, tokens)
            assert len(header) <= self._header_bytes  # nothing came that begin was not told of
            self._opened.seek(0)
            self._opened.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
            self._opened.flush()
            os.fsync(self._opened.fileno())
            self._draft.replace(self._path)
        self.num_bytes += 8 + self._header_bytes

    @property
    def _opened(self) -> BinaryIO:
        assert self._file is not None  # used within its block
        return self._file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--output {self._path}: {error.strerror}") from None


def _header(metadata: Mapping[str, str], features: Mapping[str, _Entry], tokens: Mapping[str, _Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    for kind, entries in ((FEATURES, features), (TOKENS, tokens)):
        for name, entry in entries.items():
            offsets = [entry.start, entry.end]
            header[f"{name}.{kind}"] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    return json.dumps(header, separators=(",", ":")).encode()
