"""A JSON object of a checkpoint whose every complaint names file and key. Knows nothing of what the keys mean."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from common.service.errors import CheckpointError

MISSING: Final = object()
"""Default of a key that must be there."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Section:
    """``values`` and where they stand: the object at ``path`` (empty, or ending in a dot) of ``file``."""

    file: str
    path: str
    values: Mapping[str, Any]

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.path}{key}: {problem}")

    def get(self, key: str, kind: type[_T], default: Any = MISSING) -> _T:
        """The value of ``key``, which must be a ``kind``; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            if default is MISSING:
                raise self.error(key, f"missing, expected {kind.__name__}")
            value = default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(key, f"expected {kind.__name__}, found {str(value)[:64]!r}")
        return value

    def positive(self, key: str, kind: type[_T], default: Any = MISSING) -> _T:
        value = self.get(key, kind, default)
        if not value > 0:  # type: ignore[operator]
            raise self.error(key, f"expected a positive number, found {value}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: Any = MISSING) -> Any:
        value = self.get(key, str, default)
        if value not in choices:
            raise self.error(key, f"expected one of {', '.join(choices)}, found {value[:64]!r}")
        return value

    def section(self, key: str) -> "Section":
        return Section(self.file, f"{self.path}{key}.", self.get(key, dict))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None


def read_section(path: Path, name: str) -> Section | None:
    """A JSON file of the checkpoint, or None if there is none."""
    try:
        text = (path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name}: cannot be read ({type(error).__name__})") from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{name}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: expected a JSON object, found {type(values).__name__}")
    return Section(name, "", values)
