"""``DvD``: ask a model from Python, on servers of one's own or on a deployment that runs already.

Synchronous, and free of event loops, so that it works in a script, on any thread and in a notebook alike.
"""

import random
import time
import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any, Final, Self, Unpack, overload

from pydantic import ValidationError

from common.service.errors import ConfigError, Overloaded, Unavailable
from deploy.client import Answer, ChatClient, Message
from deploy.images import ImageSource, as_images
from deploy.local import to_stderr
from deploy.offline.background import BackgroundDeployment
from deploy.offline.batch import BatchStream
from deploy.offline.conversation import Conversation
from deploy.offline.prompt import (
    AnyPrompt,
    Prompt,
    PromptLike,
    Sampling,
    as_prompt,
    check_sampling,
    refuse_unknown,
    request_fields,
)
from deploy.offline.reply import Reply, Stopwatch, Stream, reply_of
from deploy.settings import ServeSettings

DEFAULT_CONCURRENCY: Final = 64  # what one language server batches
_TIMEOUT_SECONDS: Final = 600.0
_LOCAL_TIMEOUT_SECONDS: Final = 86400.0  # nobody else waits: a long batch on a slow machine is no fault
_OVERLOADED_SECONDS: Final = 600.0
_MAX_PAUSE_SECONDS: Final = 10.0
_NOTICE_SECONDS: Final = 2.0
_LOCAL_OPTIONS: Final[Mapping[str, Any]] = {
    "port": 0,
    "log_level": "warning",
    "enable_per_request_metrics": True,
    "request_timeout": _LOCAL_TIMEOUT_SECONDS,
    "feature_timeout": _LOCAL_TIMEOUT_SECONDS,
}


class DvD:
    """One model that answers. Made by ``DvD.local`` or ``DvD.connect``; may be used by several threads.

    A context manager: after the block, and at the latest with the program, nothing of ours is left running.

    Attributes:
        model: the name it is served under.
        address: ``http://host:port`` of the router.
    """

    def __init__(self, client: ChatClient, address: str, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise ConfigError("max_concurrency must be at least 1")
        self._client = client
        self._max_concurrency = max_concurrency
        self._deployment: BackgroundDeployment | None = None
        # Also where nobody closes it: when it is forgotten, at the latest at the end of the program.
        self._end: weakref.finalize[..., Any] = weakref.finalize(self, client.close)
        self.address = address
        self.model = _first(client.models())

    @classmethod
    def local(
        cls, model: str, *, max_concurrency: int = DEFAULT_CONCURRENCY, verbose: bool = False, **options: Any
    ) -> Self:
        """Start vision servers, language servers and a router on this machine, and return when they serve.

        Args:
            model: a directory with a checkpoint, or ``nano`` for the one that comes with DvD.
            max_concurrency: prompts of a batch that are asked at once.
            verbose: show on stderr what the servers write there, such as progress while loading.
            options: as ``dvd serve --help`` lists them, with underscores, such as ``colocated=True``.

        Raises:
            TypeError: there is no such option.
            ConfigError: the model is not a directory with a checkpoint, or a value is none.
            StartupError: it cannot start; nothing is left running.
        """
        settings = _serve_settings(model, options)
        deployment = BackgroundDeployment(settings, to_stderr if verbose else None)
        deployment.start()
        try:
            key = settings.api_key[0].get_secret_value() if settings.api_key else ""
            client = ChatClient(deployment.address, key, settings.request_timeout)
            dvd = cls(client, deployment.address, max_concurrency)
        except BaseException:  # Ctrl-C as well: nothing may be left running
            deployment.stop(at_once=True)
            raise
        dvd._deployment = deployment
        dvd._end.detach()
        dvd._end = weakref.finalize(dvd, _stop, client, deployment)
        return dvd

    @classmethod
    def connect(
        cls,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = _TIMEOUT_SECONDS,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> Self:
        """Ask a deployment that runs already.

        Args:
            base_url: such as ``http://127.0.0.1:8000``, with or without ``/v1``.
            api_key: bearer token, where it wants one.
            timeout: seconds without a sign of life after which an answer is given up.
            max_concurrency: prompts of a batch that are asked at once.

        Raises:
            ConfigError: not a URL.
            Unavailable: nobody answers there.
            AuthenticationFailed: the key is not accepted.
        """
        address = base_url.rstrip("/").removesuffix("/v1")
        client = ChatClient(address, api_key or "", timeout)
        try:
            return cls(client, address, max_concurrency)
        except BaseException:  # Ctrl-C as well
            client.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._deployment is not None:
            self._deployment.stop(at_once=True)
        self.close()

    def close(self) -> None:
        """Stop what ``local`` started. Harmless when it is closed already."""
        self._end()

    @overload
    def generate(
        self,
        prompts: PromptLike,
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply: ...

    @overload
    def generate(
        self,
        prompts: list[AnyPrompt],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Reply]: ...

    def generate(
        self,
        prompts: PromptLike | list[AnyPrompt],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply | list[Reply]:
        """Answer one prompt, or all of a list at once, in its order.

        Args:
            prompts: one prompt: a text, ``(text, image or images)`` or a ``Prompt``; or a list of such.
            images: go before the text: paths, URLs, bytes of image files, PIL images. In a list, of prompts that name
                none themselves.
            system: system message of prompts without their own.
            sampling: see ``Sampling``.

        Raises:
            TypeError: a sampling keyword that does not exist, or something that is no prompt or no image.
            InvalidRequest: an image cannot be read, or the server refused the request.
            Overloaded: the server was full for ten minutes.
            Unavailable: the server cannot be reached, or failed.
            BatchError: prompts of a list failed; it holds the replies of the others.
        """
        return self.stream(prompts, images, system=system, **sampling).finish()

    @overload
    def stream(
        self,
        prompts: PromptLike,
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream: ...

    @overload
    def stream(
        self,
        prompts: list[AnyPrompt],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> BatchStream: ...

    def stream(
        self,
        prompts: PromptLike | list[AnyPrompt],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream | BatchStream:
        """``generate`` in pieces: text as it comes, for a list ``(index of the prompt, text)``.

        What a model thinks before its answer comes as ``Thought``, a string of its own kind.

        Errors are those of ``generate``, raised while iterating where the server tells them.
        """
        check_sampling(sampling)
        shared = as_images(images)

        def ask(prompt: Prompt) -> Stream:
            return Stream(self._answer_prompt(prompt, {**sampling, **prompt.sampling}))

        if isinstance(prompts, list):
            return BatchStream(ask, [as_prompt(each, shared, system) for each in prompts], self._max_concurrency)
        return ask(as_prompt(prompts, shared, system))

    def chat(self, system: str | None = None, **sampling: Unpack[Sampling]) -> Conversation:
        """A conversation that remembers its turns; ``sampling`` is for all of them.

        Raises:
            TypeError: a sampling keyword that does not exist.
        """
        check_sampling(sampling)
        return Conversation(lambda messages, options: Stream(self._answer(messages, options)), system, sampling)

    def _answer_prompt(self, prompt: Prompt, options: Mapping[str, Any]) -> Generator[str, None, Reply]:
        """Images are read here, when the prompt has its turn: not all of a batch at once."""
        return (yield from self._answer(prompt.messages(), options))

    def _answer(self, messages: list[Message], options: Mapping[str, Any]) -> Generator[str, None, Reply]:
        """Ask, and again while the server is full: whoever works offline wants an answer, not to be turned away."""
        if not self._end.alive:
            raise Unavailable("this DvD was closed")
        watch = Stopwatch()
        while True:
            answer = Answer()
            try:
                yield from self._ask_once(answer, messages, options, watch)
                return reply_of(answer, watch)
            except Overloaded as error:
                if watch.has_first_token or watch.elapsed() > _OVERLOADED_SECONDS:
                    raise
                pause = 1.0 if error.retry_after is None else error.retry_after
            except Unavailable:
                self._raise_failure()
                raise
            time.sleep(min(pause, _MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.5))  # not all at once again

    def _ask_once(
        self, answer: Answer, messages: list[Message], options: Mapping[str, Any], watch: Stopwatch
    ) -> Generator[str]:
        body = {"model": self.model, "stream_options": {"include_usage": True}, **request_fields(options)}
        with closing(self._client.stream_into(answer, messages, **body)) as pieces:
            for piece in pieces:
                watch.token()
                yield piece

    def _raise_failure(self) -> None:
        """Say which server died rather than that a connection broke."""
        failure = None if self._deployment is None else self._deployment.wait_ended(_NOTICE_SECONDS)
        if failure is not None:
            raise Unavailable(str(failure)) from None


def _stop(client: ChatClient, deployment: BackgroundDeployment) -> None:
    client.close()  # first: a router that drains waits for connections that are kept open
    deployment.stop()


def _first(models: list[str]) -> str:
    if not models:
        raise Unavailable("no model is served there yet")
    return models[0]


def _serve_settings(model: str, options: Mapping[str, Any]) -> ServeSettings:
    refuse_unknown(options, ServeSettings.model_fields, "option")
    try:
        return ServeSettings(model=model, **{**_LOCAL_OPTIONS, **options})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: {first['msg']} (got {str(first.get('input'))[:64]!r})") from None
