"""A conversation: every turn is asked with all before it; only what is new is computed, thanks to the prefix cache."""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Unpack

from deploy.client import Message, Thought, user_message
from deploy.images import ImageSource, as_images
from deploy.offline.prompt import Sampling, check_sampling, opening
from deploy.offline.reply import Reply, Stream

AskMessages = Callable[[list[Message], Mapping[str, Any]], Stream]


class Conversation:
    """Turn after turn, from one thread at a time.

    Attributes:
        history: the messages so far, as the chat API takes them. A turn that failed is not in it; of one that was
            closed early what had been said. What the model thought is not in it either: the next turn does not need
            it, and pays for every token.
    """

    def __init__(self, ask: AskMessages, system: str | None = None, sampling: Mapping[str, Any] | None = None) -> None:
        self._ask = ask
        self._sampling = dict(sampling or {})
        self.history: list[Message] = opening(system)

    def send(self, text: str, images: ImageSource | Iterable[ImageSource] = (), **sampling: Unpack[Sampling]) -> Reply:
        """The answer to the next turn. Raises as ``DvD.generate`` does."""
        return self.stream(text, images, **sampling).finish()

    def stream(
        self, text: str, images: ImageSource | Iterable[ImageSource] = (), **sampling: Unpack[Sampling]
    ) -> Stream:
        """The same in pieces."""
        check_sampling(sampling)
        return Stream(self._turn(text, as_images(images), {**self._sampling, **sampling}))

    def _turn(
        self, text: str, images: tuple[ImageSource, ...], sampling: Mapping[str, Any]
    ) -> Generator[str, None, Reply]:
        question = user_message(text, images)
        said = ""
        with self._ask([*self.history, question], sampling) as pieces:
            try:
                for piece in pieces:
                    said += "" if isinstance(piece, Thought) else piece
                    yield piece
            except GeneratorExit:
                self._keep(question, said)
                raise
            reply = pieces.finish()
        self._keep(question, reply.text)
        return reply

    def _keep(self, question: Message, answer: str) -> None:
        self.history += [question, {"role": "assistant", "content": answer}]
