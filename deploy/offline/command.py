"""``dvd generate``: start everything, answer on stdout, stop. What is not an answer goes to stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console

from common.service.errors import ConfigError, DvdError, InvalidRequest, to_http
from deploy.client import Thought
from deploy.images import is_url
from deploy.offline.batch import BatchError, BatchStream, Outcome
from deploy.offline.dvd import DvD
from deploy.offline.prompt import Prompt, Sampling
from deploy.offline.prompt_file import Line, read_prompts
from deploy.offline.reply import Stream
from deploy.settings import GenerateSettings, ServeSettings
from vision_server.media import open_image

_SAMPLING: Final = ("thinking", "max_tokens", "temperature", "top_p", "top_k", "seed")
_PIPE_CLOSED_STATUS: Final = 141  # what a shell reports for a command that SIGPIPE ended


def main(settings: GenerateSettings, prompt: str | None) -> int:
    """0 when every prompt was answered, 1 when not.

    Raises:
        ConfigError: there is nothing to ask, or an image cannot be used; nothing was started.
        DvdError: the system cannot start, or the only prompt failed.
    """
    lines = _questions(settings, prompt)
    _check_images(lines, settings.image)
    sampling = cast(Sampling, _said(settings, _SAMPLING))
    try:
        with DvD.local(settings.model, verbose=True, **_serve_options(settings)) as dvd:
            if settings.prompts is None:
                stream = dvd.stream(lines[0].prompt, settings.image, system=settings.system, **sampling)
                return _show_one(stream, as_json=settings.format == "json")
            prompts = [line.prompt for line in lines]
            batch = dvd.stream(prompts, settings.image, system=settings.system, **sampling)
            return _show_all(batch, lines, as_json=settings.format == "json")
    except BrokenPipeError:
        # Python writes what is left at exit; there is nobody to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED_STATUS


def _questions(settings: GenerateSettings, prompt: str | None) -> list[Line]:
    if prompt is not None and settings.prompts is not None:
        raise ConfigError("a prompt and --prompts: say one of them")
    if settings.prompts is not None:
        return read_prompts(settings.prompts)
    if prompt is None:
        raise ConfigError("there is no prompt: dvd generate MODEL PROMPT, or --prompts FILE")
    return [Line("", Prompt(prompt))]


def _check_images(lines: Sequence[Line], shared: Sequence[str]) -> None:
    """Before a model is loaded, which may take minutes. A file may name very many: those must only exist."""
    for image in shared:
        _check_image(image)
    for line in lines:
        for image in map(str, line.prompt.images):
            if not is_url(image) and not Path(image).is_file():
                raise ConfigError(f"{line.place}: {image}: no such file")


def _check_image(image: str) -> None:
    if is_url(image):
        return
    try:
        open_image(Path(image).read_bytes())
    except OSError as error:
        raise ConfigError(f"--image {image}: {error.strerror}") from None
    except InvalidRequest as error:
        raise ConfigError(f"--image {image}: {error.message}") from None


def _serve_options(settings: GenerateSettings) -> Mapping[str, Any]:
    """What was said of serving; everything else is as ``DvD.local`` has it."""
    return _said(settings, ServeSettings.model_fields.keys() - {"config", "dump_config", "model"})


def _said(settings: GenerateSettings, names: Sequence[str] | set[str]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names if name in settings.model_fields_set}


def _show_one(stream: Stream, *, as_json: bool) -> int:
    if as_json:
        _print(_as_json(stream.finish()))
        return 0
    has_begun = False
    try:
        for piece in _without_thoughts(stream):
            _print(piece)
            has_begun = True
    except DvdError:
        if has_begun:  # its message starts a line of its own
            _print("\n")
        raise
    _print("\n")
    return 0


def _without_thoughts(pieces: Iterator[str]) -> Iterator[str]:
    """Shows them on stderr, which is no answer's: dim on a terminal, and on a line of their own."""
    console = Console(stderr=True)
    for is_thought, group in groupby(pieces, lambda piece: isinstance(piece, Thought)):
        if not is_thought:
            yield from group
            continue
        try:
            for piece in group:
                console.out(piece, end="", style="dim", highlight=False)
        finally:
            console.out("")


def _show_all(batch: BatchStream, lines: Sequence[Line], *, as_json: bool) -> int:
    """Answers in the order of the prompts; 1 when one of them failed."""
    for piece in _outcomes_in_order(batch) if as_json else _texts_in_order(batch):
        _print(piece)
    for line, outcome in zip(lines, batch.outcomes, strict=True):
        if isinstance(outcome, DvdError):
            print(f"dvd generate: {line.place}: {outcome}", file=sys.stderr)
    return 1 if any(isinstance(outcome, DvdError) for outcome in batch.outcomes) else 0


def _texts_in_order(batch: BatchStream) -> Iterator[str]:
    """The first answer that has not ended as it comes; what later ones say is kept until it is their turn, what they
    think is not shown: --json has it."""
    texts = ["" for _ in batch.outcomes]
    current = 0
    for index, piece in _pieces(batch):
        texts[index] += "" if isinstance(piece, Thought) else piece
        while current < len(texts):
            yield texts[current]
            texts[current] = ""
            if batch.outcomes[current] is None:
                break
            yield "\n"
            current += 1


def _outcomes_in_order(batch: BatchStream) -> Iterator[str]:
    current = 0
    for _ in _pieces(batch):
        while current < len(batch.outcomes) and (outcome := batch.outcomes[current]) is not None:
            yield _as_json(outcome)
            current += 1


def _pieces(batch: BatchStream) -> Iterator[tuple[int, str]]:
    """All there are, and an empty one when all have ended, well or not."""
    with contextlib.suppress(BatchError):
        yield from batch
    yield 0, ""


def _as_json(outcome: Outcome) -> str:
    """One line: a reply, or the error as the HTTP API has it."""
    content = to_http(outcome)[1] if isinstance(outcome, DvdError) else asdict(outcome)
    return json.dumps(content, ensure_ascii=False) + "\n"


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
