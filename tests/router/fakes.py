"""In-process language and vision servers behind real gRPC, without a model.

Their answers are functions of what they were sent, so that a mix-up shows as a wrong answer: the language server says
how the messages read, with each image replaced by the first digits of the hash of the bytes that vision delivered.
"""

import abc
import asyncio
import contextlib
import hashlib
import io
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from PIL import Image

from common.model.geometry import Tiling, count_tiles
from common.service.errors import DvdError
from common.service.keys import Keys
from common.service.rpc import bind, make_server
from protos import language_pb2 as lang
from protos import language_pb2_grpc, vision_pb2_grpc
from protos.status_pb2 import (
    FEATURE_DTYPE_FLOAT32,
    WORKER_STATE_READY,
    Endpoint,
    LanguageLoad,
    ModelInfo,
    VisionLoad,
    WorkerState,
    WorkerStatus,
)
from protos.vision_pb2 import (
    EncodeReply,
    EncodeRequest,
    ProbeReply,
    ProbeRequest,
    ScoreReply,
    ScoreRequest,
    TilingOptions,
    VisionTimings,
)

FINGERPRINT = b"f" * 16
MODEL = ModelInfo(
    model="fake",
    max_model_len=4096,
    image_size=448,
    tokens_per_tile=256,
    min_dynamic_patch=1,
    max_dynamic_patch=12,
    use_thumbnail=True,
    dynamic_image_size=True,
    vocab_size=1000,
    default_temperature=0.7,
    default_top_p=0.9,
    default_top_k=20,
    default_repetition_penalty=1.1,
)
FLASH = ModelInfo(is_flash=True, vir_relative_threshold=0.5, vir_absolute_threshold=0.25)
FLASH.MergeFrom(MODEL)
SAVED_TOKENS = 192
"""What a Flash model saves in every prompt with media."""


def digest(image: bytes) -> str:
    """How an image reads in an answer."""
    return hashlib.sha256(image).hexdigest()[:8]


class FakeWorker(abc.ABC):
    """A server on a free port whose status is set by the test."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: WorkerState = WORKER_STATE_READY
        self.fingerprint = FINGERPRINT
        self.model = MODEL
        self.incarnation = secrets.token_bytes(16)
        self.is_silent = False  # a hang: the stream lives, nothing is sent
        self.is_stuck = False  # a hang of the thread that computes: statuses come, and show no progress
        self._progress = 0
        self.is_dead = False  # after ``die``
        self.num_watching = 0  # status streams that are open
        self.metadata: list[dict[str, Any]] = []  # of Generate and Encode
        self.address = ""
        self.keys: Keys | None = None
        self._server: grpc.aio.Server | None = None
        self._dying: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        self._server = make_server()
        self._register(self._server)
        self.address = bind(self._server, self.address or "127.0.0.1:0", self.keys)
        await self._server.start()

    async def stop(self) -> None:
        """Like a kill: every connection breaks."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def die(self) -> None:
        """In the middle of a call, which has no end then."""
        self.is_dead = True
        self._dying = asyncio.create_task(self.stop())
        await asyncio.Event().wait()

    def change(self, **attributes: Any) -> None:
        """Set attributes and tell the routers."""
        for name, value in attributes.items():
            setattr(self, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[WorkerStatus]:
        self.num_watching += 1
        try:
            while True:
                changed = self._changed
                if not self.is_silent:
                    yield self._status()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), 1)
        finally:
            self.num_watching -= 1

    def _status(self) -> WorkerStatus:
        self._progress += not self.is_stuck
        status = WorkerStatus(
            name=self.name,
            state=self.state,
            progress=self._progress,
            incarnation=self.incarnation,
            fingerprint=self.fingerprint,
            model=self.model,
        )
        self._fill_load(status)
        return status

    @abc.abstractmethod
    def _fill_load(self, status: WorkerStatus) -> None:
        """Put the tier's load into a status."""

    @abc.abstractmethod
    def _register(self, server: grpc.aio.Server) -> None:
        """Add the tier's service."""


@dataclass
class Gate:
    """A place where a test can hold a call, and see that it came, and how it went."""

    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    closes_after: int | None = None  # calls that pass before the gate closes by itself
    num_entered: int = 0
    num_cancelled: int = 0
    num_passed: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.is_open.set()

    async def pass_through(self) -> None:
        if self.num_entered == self.closes_after:
            self.is_open.clear()
        self.num_entered += 1
        self.changed.set()
        try:
            await self.is_open.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.changed.set()
            raise
        self.num_passed += 1

    async def wait_for(self, condition: Callable[["Gate"], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()


class FakeLanguage(FakeWorker):
    """Says the prompt, one word per token, once all features have come."""

    def __init__(self, name: str = "language-0") -> None:
        super().__init__(name)
        self.requests: list[lang.GenerateRequest] = []
        self.fail_with: DvdError | None = None  # before Admitted
        self.fail_after: tuple[int, DvdError] | None = None  # after so many tokens
        self.break_after: int | None = None  # tokens, then the connection breaks
        self.breaks_before_end = False  # with all tokens of a choice said, and not that it has ended
        self.breaks_behind_end = False  # with everything said, and the call open
        self.words: list[str] | None = None  # said instead of the prompt
        self.num_words: list[int] = []  # of each choice; empty: all say everything
        self.thoughts: list[str] = []  # before that, a token each
        self.held = ("", "")  # reasoning and text that come with the end
        self.breaking: asyncio.Task[None] | None = None
        self.on_break: Callable[[], Awaitable[None]] = _at_once
        self.num_said = 0  # tokens and ends
        self.at_admission = Gate()
        self.at_token = Gate()
        self.load = LanguageLoad()
        self.delivered: dict[bytes, asyncio.Future[bytes]] = {}  # ticket -> image
        self.resident: dict[bytes, bytes] = {}  # mm_hash -> image: not asked for again
        self.keeps_features = False  # whatever arrives becomes resident
        self.seals_features = False
        self.is_old = False  # knows nothing of continuations
        self.texts: list[lang.TokenizeRequest] = []
        self.text_failures: list[DvdError] = []  # raised by the next calls about texts, in order
        self.at_text = Gate()

    async def Generate(self, request: lang.GenerateRequest, context: Any) -> AsyncIterator[lang.GenerateEvent]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.is_old:
            request.ClearField("continuations")
        await self.at_admission.pass_through()
        if self.fail_with is not None:
            raise self.fail_with
        tickets = [secrets.token_bytes(32) for _ in request.images]
        loop = asyncio.get_running_loop()
        self.delivered |= {ticket: loop.create_future() for ticket in tickets}
        is_missing = [image.mm_hash not in self.resident for image in request.images]
        for image, ticket in zip(request.images, tickets, strict=True):
            if image.mm_hash in self.resident:
                self.delivered[ticket].set_result(self.resident[image.mm_hash])
        yield lang.GenerateEvent(
            admitted=lang.Admitted(
                missing=[
                    lang.ImageTicket(image_index=i, ticket=tickets[i]) for i, miss in enumerate(is_missing) if miss
                ],
                deliver_to=[Endpoint(transport="grpc", address=self.address)],
                dtype=FEATURE_DTYPE_FLOAT32,
                num_prompt_tokens=10 + sum(image.max_num_tokens for image in request.images),
                num_replayed_tokens=sum(len(each.output_token_ids) for each in request.continuations),
                seals_features=self.seals_features,
            )
        )
        images = [await self.delivered[ticket] for ticket in tickets]
        if self.keeps_features:
            self.resident |= {image.mm_hash: data for image, data in zip(request.images, images, strict=True)}
        words = self.words if self.words is not None else read_aloud(request, images)
        pieces = [*((thought, "") for thought in self.thoughts), *(("", word) for word in words)]
        async for event in self._say(request, pieces):
            self.num_said += 1
            yield event
        if self.breaks_behind_end:
            await self._break()

    async def Tokenize(self, request: lang.TokenizeRequest, context: Any) -> lang.TokenizeReply:
        """One id a word, which says how long the word is."""
        self.texts.append(request)
        await self.at_text.pass_through()
        if self.text_failures:
            raise self.text_failures.pop(0)
        images = [b"" for _ in request.num_tiles]
        spoken = lang.GenerateRequest(messages=request.messages)
        words = request.raw.text.split() if request.HasField("raw") else read_aloud(spoken, images)
        return lang.TokenizeReply(
            token_ids=[len(word) for word in words], token_strs=words if request.return_token_strs else ()
        )

    async def Detokenize(self, request: lang.DetokenizeRequest, context: Any) -> lang.DetokenizeReply:
        if self.text_failures:
            raise self.text_failures.pop(0)
        return lang.DetokenizeReply(text=" ".join(str(token_id) for token_id in request.token_ids))

    async def _say(
        self, request: lang.GenerateRequest, pieces: list[tuple[str, str]]
    ) -> AsyncIterator[lang.GenerateEvent]:
        """Position by position, each choice in turn, what no server has said before."""
        lengths = self.num_words or [len(pieces)] * request.sampling.n
        heard = heard_of(request)
        for index in range(max(lengths) + 1):
            for choice in [choice for choice in heard if lengths[choice] == index]:
                if self.breaks_before_end:
                    await self._break()
                del heard[choice]
                yield self._end(request, choice, index)
            speaking = [choice for choice in heard if heard[choice] <= index]
            if not speaking:
                continue
            await self.at_token.pass_through()
            if self.fail_after is not None and index == self.fail_after[0]:
                raise self.fail_after[1]
            if index == self.break_after:
                await self._break()
            for choice in speaking:
                thought, word = pieces[index]
                said = token(choice, index, thought or word, request.sampling)
                said.reasoning, said.text = thought, word
                yield lang.GenerateEvent(token=said)

    async def _break(self) -> None:
        await self.on_break()
        self.breaking = asyncio.create_task(self.stop())
        await asyncio.Event().wait()

    def _end(self, request: lang.GenerateRequest, choice: int, num_tokens: int) -> lang.GenerateEvent:
        end = finished(choice, num_tokens, request.images, SAVED_TOKENS if self.model.is_flash else 0)
        end.reasoning, end.text = self.held
        end.usage.reasoning_tokens = len(self.thoughts)
        return lang.GenerateEvent(finished=end)

    def _fill_load(self, status: WorkerStatus) -> None:
        status.language.CopyFrom(self.load)

    def _register(self, server: grpc.aio.Server) -> None:
        language_pb2_grpc.add_LanguageServicer_to_server(self, server)


class FakeVision(FakeWorker, vision_pb2_grpc.VisionServicer):
    """Hands the image's bytes to the language server that asked for them."""

    def __init__(self, languages: list[FakeLanguage], name: str = "vision-0") -> None:
        super().__init__(name)
        self.languages = languages
        self.requests: list[EncodeRequest] = []
        self.failures: list[DvdError] = []  # raised by the next calls, in order
        self.poison: bytes | None = None  # an image that kills
        self.score_requests: list[ScoreRequest] = []
        self.score_failures: list[DvdError] = []
        self.scores: Callable[[ScoreRequest], list[float]] = scores_of
        self.probe_requests: list[ProbeRequest] = []
        self.probe_failures: list[DvdError] = []
        self.length = ProbeReply(seconds=10.0, num_frames=300)  # of every video
        self.load = VisionLoad()
        self.at_encode = Gate()
        self.at_score = Gate()
        self.at_probe = Gate()

    async def Encode(self, request: EncodeRequest, context: Any) -> EncodeReply:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        await self.at_encode.pass_through()
        if request.image == self.poison:
            await self.die()
        if self.failures:
            raise self.failures.pop(0)
        for language in self.languages:
            if language.address == request.deliver_to[0].address:
                arrival = language.delivered[request.ticket]
                if not arrival.done():
                    arrival.set_result(request.image)
        return EncodeReply(
            num_tiles=1,
            tokens_per_tile=[256],
            feature_bytes=1024,
            transport="grpc",
            timings=VisionTimings(decode_ms=1, queue_ms=2, encode_ms=3, transfer_ms=4),
        )

    async def Score(self, request: ScoreRequest, context: Any) -> ScoreReply:
        self.score_requests.append(request)
        await self.at_score.pass_through()
        if self.score_failures:
            raise self.score_failures.pop(0)
        return ScoreReply(scores=self.scores(request))

    async def Probe(self, request: ProbeRequest, context: Any) -> ProbeReply:
        self.probe_requests.append(request)
        await self.at_probe.pass_through()
        if self.probe_failures:
            raise self.probe_failures.pop(0)
        return self.length

    def _fill_load(self, status: WorkerStatus) -> None:
        status.vision.CopyFrom(self.load)

    def _register(self, server: grpc.aio.Server) -> None:
        vision_pb2_grpc.add_VisionServicer_to_server(self, server)


def heard_of(request: lang.GenerateRequest) -> dict[int, int]:
    """How much of each open choice another server has said. Ids are positions, so a gap or a repetition shows."""
    heard = dict.fromkeys(range(request.sampling.n), 0)
    for continuation in request.continuations:
        ids = list(continuation.output_token_ids)
        assert ids == list(range(len(ids))), f"choice {continuation.choice} was told {ids}"
        heard[continuation.choice] = len(ids)
        if continuation.is_finished:
            del heard[continuation.choice]
    return heard


async def _at_once() -> None:
    pass


def num_tiles_of(image: bytes, tiling: TilingOptions) -> int:
    """As a vision server counts them."""
    if tiling.num_frames:
        return tiling.num_frames
    with Image.open(io.BytesIO(image)) as opened:
        limits = Tiling(tiling.min_dynamic_patch, tiling.max_dynamic_patch, tiling.use_thumbnail)
        return count_tiles(opened.width, opened.height, limits)


def scores_of(request: ScoreRequest) -> list[float]:
    """A function of the image, one for each tile. Halves of 1/256 are the same in every float."""
    first = hashlib.sha256(request.image).digest()[0]
    return [((first + tile) % 256) / 256 for tile in range(num_tiles_of(request.image, request.tiling))]


def read_aloud(request: lang.GenerateRequest, images: list[bytes]) -> list[str]:
    """The prompt in words: roles, text, and a digest where an image stands; with its tile where it is a part."""
    words: list[str] = request.raw.text.split() if request.HasField("raw") else []
    for message in request.messages:
        words.append(f"{message.role}:")
        for part in message.parts:
            kind = part.WhichOneof("part")
            if kind == "text":
                words.extend(part.text.split())
            elif kind == "image_index":
                words.append(f"[{digest(images[part.image_index])}]")
            else:
                words.append(f"[{'+'.join(_piece(piece, images) for piece in part.block.pieces)}]")
    return [*words[:1], *(f" {word}" for word in words[1:])]


def _piece(piece: lang.ImagePiece, images: list[bytes]) -> str:
    name = digest(images[piece.image_index])
    return f"{name}#{piece.first_tile}" if piece.num_tiles else name


def token(choice: int, index: int, word: str, sampling: lang.SamplingParams) -> lang.Token:
    reply = lang.Token(choice=choice, token_id=index, text=word)
    if sampling.logprobs:
        reply.logprob.CopyFrom(logprob(index, word, -0.5))
        reply.top_logprobs.extend(logprob(index + k, word, -0.5 - k) for k in range(sampling.top_logprobs))
    return reply


def logprob(token_id: int, word: str, value: float) -> lang.TokenLogprob:
    return lang.TokenLogprob(token_id=token_id, text=word, logprob=value, token_bytes=word.encode())


def finished(choice: int, num_tokens: int, images: Sequence[lang.ImageRef], saved_tokens: int) -> lang.Finished:
    image_tokens = sum(image.max_num_tokens for image in images if not image.is_video)
    video_tokens = sum(image.max_num_tokens for image in images if image.is_video)
    return lang.Finished(
        choice=choice,
        finish_reason="stop",
        usage=lang.Usage(
            prompt_tokens=10 + image_tokens + video_tokens,
            completion_tokens=num_tokens,
            cached_tokens=3,
            image_tokens=image_tokens,
            video_tokens=video_tokens,
            saved_tokens=saved_tokens,
        ),
        timings=lang.LanguageTimings(queue_ms=1, feature_wait_ms=2, prefill_ms=3, decode_ms=40),
    )
