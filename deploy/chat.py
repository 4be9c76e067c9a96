"""``dvd chat``: a conversation in the terminal. Reads lines, so it also works with a pipe instead of a keyboard."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from common.service.errors import DvdError
from deploy.client import ChatClient, Message, Thought, thinking_option, user_message
from deploy.local import LocalDeployment
from deploy.settings import ChatSettings, ServeSettings

_HELP = (
    "/image PATH attaches an image to the next message, /reset forgets the conversation, /quit leaves; "
    "Ctrl-C stops an answer"
)
_PROMPT = "> "


class Chat:
    """One conversation: what was said, and the images waiting for the next message."""

    def __init__(
        self, client: ChatClient, console: Console, options: dict[str, Any], system: str | None = None
    ) -> None:
        self._client = client
        self._console = console
        self._options = options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.history: list[Message] = list(self._opening)
        self.images: list[Path] = []

    def take(self, line: str) -> bool:
        """Do what one line says; False when it says goodbye."""
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command == "/image":
            self._attach(Path(argument.strip()).expanduser())
        elif command == "/reset":
            self.history, self.images = list(self._opening), []
            self._note("the conversation starts anew")
        elif command.startswith("/"):
            self._note(_HELP)
        elif line.strip():
            self._ask(line.strip())
        return True

    def _attach(self, image: Path) -> None:
        if not image.is_file():
            self._note(f"no such file: {image}")
            return
        self.images.append(image)
        self._note(f"{image.name} goes with the next message")

    def _ask(self, text: str) -> None:
        """A failed question is taken back, so that the next one starts from a conversation the server accepts."""
        try:
            question = user_message(text, self.images)
            answer = self._stream([*self.history, question])
        except DvdError as error:
            self._note(f"error: {error}")
            return
        self.images = []
        self.history += [question, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[Message]) -> str:
        """Show the answer as it comes, thoughts dim; Ctrl-C ends it and keeps what was said, not what was thought."""
        said = ""
        is_thinking = False
        try:
            with contextlib.closing(self._client.stream(messages, **self._options)) as pieces:
                for piece in pieces:
                    if is_thinking and not isinstance(piece, Thought):
                        self._console.print()
                    is_thinking = isinstance(piece, Thought)
                    said += "" if is_thinking else piece
                    self._console.out(piece, end="", highlight=False, style="dim" if is_thinking else None)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        finally:
            self._console.print()
        return said

    def _note(self, text: str) -> None:
        self._console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)


def main(settings: ChatSettings) -> int:
    """``dvd chat``."""
    options = {name: getattr(settings, name) for name in ("max_tokens", "temperature")}
    options |= thinking_option(True) if settings.thinking else {}
    with _address(settings) as url, ChatClient(url, settings.api_key.get_secret_value()) as client:
        console = Console(highlight=False)
        model = client.models()[0]  # also says early that nobody answers
        console.print(f"[bold]{escape(model)}[/] at {url}", highlight=False)
        console.print(f"[dim]{_HELP}[/]", soft_wrap=True)
        chat = Chat(client, console, {"model": model, **options}, settings.system)
        for line in _lines(console):
            if not chat.take(line):
                break
    return 0


@contextlib.contextmanager
def _address(settings: ChatSettings) -> Iterator[str]:
    if settings.model is None:
        yield settings.url
        return
    console = Console(stderr=True)
    deployment = LocalDeployment(ServeSettings(model=settings.model, port=0, log_level="warning"))
    with console.status(f"starting {settings.model} ..."):
        deployment.start()
    with deployment:
        yield deployment.address


def _lines(console: Console) -> Iterator[str]:
    """Until the input ends. Ctrl-C at the prompt leaves as well."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield console.input(_PROMPT if sys.stdin.isatty() else "")
