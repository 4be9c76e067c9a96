"""``--prompts FILE``: a prompt a line, as plain text or as a JSON object."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from common.service.errors import ConfigError
from deploy.offline.prompt import Prompt, Sampling, refuse_unknown

STDIN: Final = Path("-")
_OWN_KEYS: Final = ("prompt", "images", "system")
_KEYS: Final = (*_OWN_KEYS, *Sampling.__annotations__)


@dataclass(frozen=True, slots=True)
class Line:
    """A prompt, and where it stands: ``FILE:LINE``."""

    place: str
    prompt: Prompt


def read_prompts(path: Path) -> list[Line]:
    """Every line that is not blank.

    An object has the key ``prompt``, and may have ``images`` (paths or URLs), ``system`` and the keywords of
    ``Sampling``.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line is none; says which.
    """
    lines = [Line(place, _parse(place, text)) for place, text in _lines(path)]
    if not lines:
        raise ConfigError(f"--prompts {path}: there is no prompt in it")
    return lines


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = sys.stdin.read() if path == STDIN else path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path}: not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), 1):  # and not at the other places where Unicode sees a line end
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _parse(place: str, line: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(line)
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: begins like a JSON object and is none: {error}") from None
    try:
        refuse_unknown(entry, _KEYS, "key")
    except TypeError as error:
        raise ConfigError(f"{place}: {error}") from None
    sampling = cast(Sampling, {name: value for name, value in entry.items() if name not in _OWN_KEYS})
    return Prompt(_text(place, entry), _images(place, entry), _system(place, entry), sampling)


def _text(place: str, entry: dict[str, Any]) -> str:
    text = entry.get("prompt")
    if not isinstance(text, str):
        raise ConfigError(f'{place}: expected "prompt" with a text')
    return text


def _images(place: str, entry: dict[str, Any]) -> list[str]:
    images = entry.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ConfigError(f'{place}: expected "images" with a list of paths or URLs')
    return images


def _system(place: str, entry: dict[str, Any]) -> str | None:
    system = entry.get("system")
    if not isinstance(system, str | None):
        raise ConfigError(f'{place}: expected "system" with a text')
    return system
