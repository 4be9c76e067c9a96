"""How a program tells whoever started it that it is ready, and where: one small JSON file, written once, atomically."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from common.service.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Announcement:
    """A program that is ready. ``address`` is what clients dial; ``metrics_address`` is empty when switched off."""

    name: str
    role: str
    address: str
    metrics_address: str
    pid: int

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None while nothing was announced."""
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None


def write(path: Path | None, *, name: str, role: str, address: str, metrics_address: str = "") -> None:
    """Announce this process at ``path``; does nothing without one.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    announcement = Announcement(name, role, address, metrics_address, os.getpid())
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(asdict(announcement)), "utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"--announce {path}: {error.strerror}") from None
