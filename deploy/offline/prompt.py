"""What is asked: text, images before it, and how the answer is to be sampled. Knows nothing of servers."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

from deploy.client import Message, thinking_option, user_message
from deploy.images import ImageSource, as_images


class Sampling(TypedDict, total=False):
    """How an answer is sampled, in the words of OpenAI and vLLM; what is not said is the model's value.

    ``thinking`` has the model think first. ``n`` is not among them: a prompt has one reply; give it several times for
    several.
    """

    thinking: bool
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    logit_bias: dict[int, float]
    ignore_eos: bool
    skip_special_tokens: bool
    max_dynamic_patch: int
    min_dynamic_patch: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. ``images`` stand before the text; ``system`` and ``sampling`` go before those of the call."""

    text: str
    images: Sequence[ImageSource] = ()
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def messages(self) -> list[Message]:
        """As the chat API takes them.

        Raises:
            InvalidRequest: an image cannot be read.
        """
        return [*opening(self.system), user_message(self.text, self.images)]


PromptLike = str | tuple[str, ImageSource | Sequence[ImageSource]] | Prompt
"""A text, a text with its image or images, or a ``Prompt``."""

AnyPrompt = TypeVar("AnyPrompt", bound=PromptLike)
"""What a list of prompts is made of."""


def as_prompt(given: PromptLike, images: Iterable[ImageSource] = (), system: str | None = None) -> Prompt:
    """``given`` with images and a system message for the case that it has none of its own.

    Raises:
        TypeError: it is no prompt, or an image of it is none.
    """
    match given:
        case str():
            return Prompt(given, as_images(images), system)
        case (str(text), its):
            return Prompt(text, as_images(its), system)
        case Prompt(text, its, its_system, sampling):
            check_sampling(sampling)
            return Prompt(text, as_images(its or images), system if its_system is None else its_system, sampling)
        case _:
            raise TypeError(f"a prompt is a text, (text, images) or a Prompt, not {type(given).__name__}")


def opening(system: str | None) -> list[Message]:
    """What a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Values are judged by the server, names here: a misspelt one would be ignored there.

    Raises:
        TypeError: names the keyword and the nearest known one.
    """
    refuse_unknown(sampling, Sampling.__annotations__, "sampling keyword")


def request_fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the words of the chat API."""
    fields = dict(sampling)
    thinking = fields.pop("thinking", None)
    return fields if thinking is None else fields | thinking_option(thinking)


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises TypeError for a name that is not known."""
    names = list(known)
    for name in given:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(names)}"
            raise TypeError(f"unknown {what} {name[:64]}{hint}")
