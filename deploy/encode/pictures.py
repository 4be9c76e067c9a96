"""The images that are to be encoded: which files, by which names, of what size. Decodes no pixel."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.service.errors import ConfigError, InvalidRequest
from common.service.rpc import MAX_MESSAGE_BYTES
from vision_server.media import open_image, upright_size

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
"""Of the files that are taken from a directory; a file that is named itself may be called anything."""

_MAX_FILE_BYTES: Final = MAX_MESSAGE_BYTES - 2**20
"""With room for the framing of the call it travels in."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file, and what its tensors are called."""

    path: Path
    name: str

    @property
    def file(self) -> str:
        """For people, and for those who read the file."""
        return _text(str(self.path))


def find_pictures(paths: Sequence[Path]) -> list[Picture]:
    """Files in the order in which they are named; of a directory all images below it, by name.

    A file is called by its stem, one from a directory by its path there, without suffix; what would be called alike is
    numbered: ``cat``, ``cat-2``.

    Raises:
        ConfigError: nothing is named, a path does not exist, or a directory holds no image.
    """
    found = [pair for path in paths for pair in _below(path)]
    if not found:
        raise ConfigError("there is no image: name files, or directories with images")
    names = _unique([name for _, name in found])
    return [Picture(path, name) for (path, _), name in zip(found, names, strict=True)]


def read_picture(picture: Picture) -> bytes:
    """The file as it is. Raises InvalidRequest, without its name, if it cannot be read or sent."""
    try:
        num_bytes = picture.path.stat().st_size
        if num_bytes > _MAX_FILE_BYTES:
            message = f"the file has {num_bytes} bytes, at most {_MAX_FILE_BYTES} are accepted"
            raise InvalidRequest(message, code="invalid_image")
        return picture.path.read_bytes()
    except OSError as error:
        raise InvalidRequest(error.strerror or "cannot be read", code="invalid_image") from None


def measure(data: bytes, *, exif_orientation: bool, max_pixels: int) -> tuple[int, int]:
    """Width and height, by the header. Raises InvalidRequest for what is no image, or has too many pixels."""
    return upright_size(open_image(data, max_pixels=max_pixels), exif_orientation=exif_orientation)


def _below(path: Path) -> list[tuple[Path, str]]:
    """Files with their names. Raises ConfigError."""
    try:
        if path.is_file():
            return [(path, _text(path.stem))]
        if not path.is_dir():
            what = "neither a file nor a directory" if path.exists() else "no such file or directory"
            raise ConfigError(f"{path}: {what}")
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not files:
        raise ConfigError(f"{path}: no image in this directory; looked for {', '.join(sorted(SUFFIXES))}")
    return [(file, _text(file.relative_to(path).with_suffix("").as_posix())) for file in files]


def _text(name: str) -> str:
    """File names may hold any bytes, names of tensors only Unicode."""
    return name.encode("utf-8", "replace").decode()


def _unique(names: Sequence[str]) -> list[str]:
    """What comes later is numbered, never into a name that another file has by itself."""
    taken, counts = set(names), Counter[str]()
    unique: list[str] = []
    for name in names:
        counts[name] += 1
        candidate = name
        while counts[name] > 1 and (candidate := f"{name}-{counts[name]}") in taken:
            counts[name] += 1
        taken.add(candidate)
        unique.append(candidate)
    return unique
