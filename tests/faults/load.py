"""Steady load with known answers, and the story of a fault: before, fault, recovery.

Nano reads its own pictures, so a crossed, mixed-up or missing feature is a wrong answer. What is right was said by the
undisturbed system itself (``Load.warm_up``) and is what the picture shows; every later answer must be the same, token
for token. Clients ask one after the other, and never repeat a request that failed.
"""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import secrets
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import httpx
import numpy as np
from PIL import Image

from deploy.nano import data

if TYPE_CHECKING:
    from tests.faults.system import System

Kind = Literal["image", "stream", "again", "pair", "text", "sampled", "grammar"]
State = Literal["right", "wrong", "failed", "hung"]

KINDS: Final[tuple[Kind, ...]] = ("image", "stream", "text", "pair", "image", "sampled", "again", "grammar")
STREAMED: Final[frozenset[Kind]] = frozenset({"stream", "text", "sampled", "grammar"})
HANG_SECONDS: Final = 75.0
"""Beyond the router's own deadline: nobody may be left without an answer for so long."""
_NUM_PICTURES: Final = 8
_NUM_CANDIDATES: Final = 4 * _NUM_PICTURES
_FIRST_SEED: Final = 10_000_000  # pictures that nano was not trained on
_STORY_SECONDS: Final = 120.0
_END_CHUNK_BYTES: Final = 12
_GRAMMAR: Final = r"The number is [0-9]{4}\."
_TASKS: Final[dict[Kind, str]] = {
    **dict.fromkeys(("image", "stream", "again", "grammar"), "number"), "pair": "pair", "text": "text",
    "sampled": "sampled",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """Pictures, words, and what the undisturbed system says to them."""

    sample: data.Sample
    pictures: tuple[bytes, ...]
    expected: str

    def body(self, kind: Kind, serial: str) -> dict[str, Any]:
        """A request. Pictures get bytes of their own, so that none is known already, but for ``again``."""
        note = "" if kind == "again" else serial
        urls = [_data_url(picture, note) for picture in self.pictures]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": self.sample.question}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 64}
        if kind == "sampled":
            body |= {"temperature": 0.8, "seed": 7, "ignore_eos": True}
        if kind == "grammar":
            body |= {"structured_outputs": {"regex": _GRAMMAR}}
        return body | {"stream": kind in STREAMED}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times are ``time.monotonic`` seconds."""

    kind: Kind
    router: str
    started: float
    ended: float
    state: State
    status: int  # 0: no answer at all
    text: str
    expected: str
    error: str

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def __str__(self) -> str:
        said = f"{self.text!r} instead of {self.expected!r}" if self.state == "wrong" else self.error
        return f"{self.kind} {self.state} after {self.seconds:.2f} s: {self.status} {said}"


class Load:
    """Clients that ask one after the other until the block ends.

    Args:
        num_clients: requests at once.
        routers: names of the routers they ask in turn; None: all. May be changed at any time.
        kinds: of requests, in turn.
        pause: seconds between two requests of one client.
    """

    def __init__(
        self,
        system: "System",
        *,
        num_clients: int = 3,
        routers: Sequence[str] | None = None,
        kinds: Sequence[Kind] = KINDS,
        pause: float = 0.1,
    ) -> None:
        self.system = system
        self.num_clients = num_clients
        self.routers = list(routers or [server.name for server in system.of("router")])
        self._kinds = list(kinds)
        self._pause = pause
        self._serials = itertools.count()
        self._name = secrets.token_hex(4)  # another load of the same system asks about other bytes
        self._turns = itertools.count()
        self._num_open = 0
        self._questions: dict[str, list[Question]] = {}
        self._outcomes: list[Outcome] = []
        self._stop = threading.Event()
        self._is_running = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self.started_at = time.monotonic()

    def __enter__(self) -> Self:
        self.warm_up()
        self._thread.start()
        self._is_running.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._is_running.set()
        if self._thread.is_alive():
            self._thread.join(HANG_SECONDS + 30)
            assert not self._thread.is_alive(), "the load does not end"

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all requests that have ended."""
        return list(self._outcomes)

    def since(self, moment: float) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ended >= moment]

    def warm_up(self) -> None:
        """Learn from the undisturbed system what it says to pictures that it reads rightly."""
        if not self._questions:
            self._questions = learn(self.system)

    def hold(self) -> None:
        """No new requests from now on."""
        self._is_running.clear()

    def pause(self) -> None:
        """No new requests from now on; returns when those that run have ended."""
        self.hold()
        deadline = time.monotonic() + HANG_SECONDS + 30
        while self._num_open and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self._num_open, "requests do not end"

    def go_on(self) -> None:
        self._is_running.set()

    def wait(self, num_more: int, seconds: float = _STORY_SECONDS) -> None:
        """Return after so many more right answers."""
        goal = self._num_right + num_more
        deadline = time.monotonic() + seconds
        while self._num_right < goal:
            assert time.monotonic() < deadline, f"no more answers: {[str(o) for o in self.outcomes[-5:]]}"
            time.sleep(0.02)

    def line(self) -> str:
        """What happened in the last second, for a terminal."""
        now = time.monotonic()
        recent = self.since(now - 1)
        states = Counter(outcome.state for outcome in recent)
        worst = max((outcome.seconds for outcome in recent), default=0.0)
        bad = [str(outcome) for outcome in recent if outcome.state != "right"]
        counts = " ".join(f"{state} {states[state]}" for state in ("right", "wrong", "failed", "hung"))
        return f"{now - self.started_at:6.1f} s  {counts}  slowest {worst:.2f} s  {'; '.join(bad)[:300]}"

    @property
    def _num_right(self) -> int:
        return sum(outcome.state == "right" for outcome in self.outcomes)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for index in range(self.num_clients):
                clients.create_task(self._ask_on(index))

    async def _ask_on(self, index: int) -> None:
        kinds = itertools.cycle(self._kinds[index % len(self._kinds) :] + self._kinds[: index % len(self._kinds)])
        async with httpx.AsyncClient(timeout=HANG_SECONDS, trust_env=False) as client:
            while not self._stop.is_set():
                if not self._is_running.is_set():
                    await asyncio.sleep(0.02)
                    continue
                self._num_open += 1
                router = self.routers[next(self._turns) % len(self.routers)]
                try:
                    self._outcomes.append(await self.ask(client, next(kinds), router))
                finally:
                    self._num_open -= 1
                await asyncio.sleep(self._pause)

    async def ask(self, client: httpx.AsyncClient, kind: Kind, router: str) -> Outcome:
        """One request."""
        number = next(self._serials)
        choice = self._questions[_TASKS[kind]]
        question = choice[number % len(choice)]
        url = f"http://{self.system[router].address}/v1/chat/completions"
        body = question.body(kind, f"{self._name} {number}")
        started = time.monotonic()
        reply = await ask_once(client, url, body)
        state: State = "hung" if reply.is_hung else "failed"
        if reply.is_complete:
            state = "right" if reply.text == question.expected else "wrong"
        ended = time.monotonic()
        return Outcome(kind, router, started, ended, state, reply.status, reply.text, question.expected, reply.error)


@dataclass(slots=True)
class Reply:
    """What one request came to. ``text`` is what arrived, also of an answer that was cut off."""

    status: int = 0
    text: str = ""
    error: str = ""
    is_complete: bool = False
    is_hung: bool = False
    headers: httpx.Headers = field(default_factory=httpx.Headers)


async def ask_once(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], on_piece: Callable[[str], None] = lambda piece: None
) -> Reply:
    """One request, streamed or not as ``body`` says. Never raises: whatever goes wrong is in the reply."""
    reply = Reply()
    try:
        async with asyncio.timeout(HANG_SECONDS), client.stream("POST", url, json=body) as response:
            reply.status, reply.headers = response.status_code, response.headers
            if response.status_code != 200:
                reply.error = (await response.aread()).decode()[:500]
            elif body.get("stream"):
                await _read_events(response, reply, on_piece)
            else:
                content = json.loads(await response.aread())
                reply.text, reply.is_complete = content["choices"][0]["message"]["content"], True
    except TimeoutError:
        reply.is_hung, reply.error = True, "no end"
    except httpx.TimeoutException as error:
        reply.is_hung, reply.error = True, repr(error)
    except httpx.TransportError as error:
        reply.error = repr(error)
    return reply


async def _read_events(response: httpx.Response, reply: Reply, on_piece: Callable[[str], None]) -> None:
    event, has_finished = "", False
    async for line in response.aiter_lines():
        if line.startswith("event:"):
            event = line.removeprefix("event:").strip()
        if not line.startswith("data:"):
            continue
        content = line.removeprefix("data:").strip()
        if event == "error" or content.startswith('{"error"'):
            reply.error = content[:500]
            return
        if content == "[DONE]":
            reply.is_complete = has_finished
            return
        for choice in json.loads(content)["choices"]:
            piece = choice["delta"].get("content") or ""
            reply.text += piece
            has_finished = has_finished or choice["finish_reason"] is not None
            on_piece(piece)
    reply.error = "the stream was cut off"


def number_question(seed: int = _FIRST_SEED) -> Question:
    """One that was not asked before; whether nano reads it rightly is not known."""
    return _question("number", seed)


def _question(task: str, seed: int) -> Question:
    sample = data.sample(task, np.random.default_rng(seed))
    return Question(sample, tuple(_png(image) for image in sample.images), sample.answer)


def learn(system: "System") -> dict[str, list[Question]]:
    """Questions of each kind that the undisturbed system answers rightly, with its answer."""
    return asyncio.run(_learn(f"{system.routers[0]}/v1/chat/completions"))


async def _learn(url: str) -> dict[str, list[Question]]:
    questions: dict[str, list[Question]] = {"number": [], "pair": [], "text": []}
    async with httpx.AsyncClient(timeout=HANG_SECONDS, trust_env=False) as client:
        for task, found in questions.items():
            wanted = 2 if task != "number" else _NUM_PICTURES
            for seed in range(_NUM_CANDIDATES):
                question = _question(task, _FIRST_SEED + seed)
                sample = question.sample
                if task == "number" and len(sample.short_answer) < 4:
                    continue  # the more digits, the less could be right by chance
                reply = await ask_once(client, url, question.body("image" if sample.images else "text", f"{seed}"))
                assert reply.is_complete, f"an undisturbed system answers: {reply}"
                if reply.text == sample.answer and sample.short_answer not in {f.sample.short_answer for f in found}:
                    found.append(question)
                if len(found) == wanted:
                    break
            assert found, f"nano answers none of the {task} questions rightly"
        questions["sampled"] = [await _sampled(client, url, question) for question in questions["text"]]
    return questions


async def _sampled(client: httpx.AsyncClient, url: str, question: Question) -> Question:
    """What is drawn depends on the seed alone."""
    reply = await ask_once(client, url, question.body("sampled", ""))
    assert reply.is_complete, f"an undisturbed system answers: {reply}"
    return replace(question, expected=reply.text)


# --- a fault, and what it did


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests of one phase."""

    outcomes: list[Outcome]

    def of(self, state: State) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state == state]

    @property
    def p99(self) -> float:
        """Seconds; 0 where nothing was asked."""
        return float(np.quantile([o.seconds for o in self.outcomes], 0.99)) if self.outcomes else 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of(state))} {state}" for state in ("right", "wrong", "failed", "hung"))
        return f"{counts}, p99 {self.p99:.2f} s"


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of a story. ``recovery_seconds``: from the fault until the last request that failed, or took much longer
    than all before the fault, had ended."""

    name: str
    before: Phase
    fault: Phase
    recovery: Phase
    detection_seconds: float | None
    recovery_seconds: float

    def __str__(self) -> str:
        seen = "" if self.detection_seconds is None else f", noticed after {self.detection_seconds:.2f} s"
        phases = "".join(f"\n  {name:9}{getattr(self, name)}" for name in ("before", "fault", "recovery"))
        return f"{self.name}{seen}, recovered after {self.recovery_seconds:.2f} s{phases}"

    @property
    def outcomes(self) -> list[Outcome]:
        return [*self.before.outcomes, *self.fault.outcomes, *self.recovery.outcomes]

    def assert_truth(self) -> None:
        """Whatever was answered is right, and nobody waits for ever."""
        bad = [str(outcome) for outcome in self.outcomes if outcome.state in ("wrong", "hung")]
        assert not bad, f"{self}\n" + "\n".join(bad)

    def assert_no_harm(self) -> None:
        """No request failed, either."""
        self.assert_truth()
        bad = [str(outcome) for outcome in self.outcomes if outcome.state == "failed"]
        assert not bad, f"{self}\n" + "\n".join(bad)


class Story:
    """``before()``, then ``with fault(): ...``, then ``recovery()``; ``report`` says what it did to the load."""

    def __init__(self, load: Load, name: str, num_requests: int = 6) -> None:
        self._load = load
        self._name = name
        self._num_requests = num_requests
        self._started = time.monotonic()
        self._fault_at = self._healed_at = self._started
        self._detection: float | None = None

    def before(self) -> None:
        """Some requests while all is well."""
        self._started = time.monotonic()
        self._load.wait(self._num_requests)

    @contextlib.contextmanager
    def fault(self) -> Iterator[None]:
        """The fault begins here, and is healed at the end of the block."""
        self._fault_at = time.monotonic()
        yield
        self._healed_at = time.monotonic()

    def detected(self, condition: Callable[[], object], within: float, what: str = "") -> None:
        """Wait until it holds; fails when it takes more than ``within`` seconds from the beginning of the fault."""
        left = within - (time.monotonic() - self._fault_at)
        self._load.system.until(condition, what or f"notice of: {self._name}", max(0.0, left))
        self._detection = time.monotonic() - self._fault_at

    def go_on(self) -> None:
        """Some requests while the fault lasts."""
        self._load.wait(self._num_requests)

    def recovery(self) -> None:
        """Some requests when all is well again."""
        self._load.wait(self._num_requests)

    @property
    def report(self) -> Report:
        """Of the requests that have ended. One that was touched by the fault counts there, whenever it began."""
        outcomes = self._load.since(self._started)
        before = Phase([o for o in outcomes if o.ended < self._fault_at])
        recovery = Phase([o for o in outcomes if o.started > self._healed_at])
        known = {id(outcome) for outcome in (*before.outcomes, *recovery.outcomes)}
        fault = Phase([outcome for outcome in outcomes if id(outcome) not in known])
        usual = max((outcome.seconds for outcome in before.outcomes), default=0.0)
        late = [o.ended for o in outcomes if o.ended > self._fault_at and not _is_usual(o, usual)]
        recovered = max([moment - self._fault_at for moment in late], default=0.0)
        return Report(self._name, before, fault, recovery, self._detection, recovered)


def _is_usual(outcome: Outcome, usual: float) -> bool:
    return outcome.state == "right" and outcome.seconds <= 2 * usual + 0.5


def _data_url(picture: bytes, note: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(_with_note(picture, note)).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _with_note(png: bytes, note: str) -> bytes:
    """The same picture in other bytes: a text chunk before the last one. Nothing is compressed again."""
    if not note:
        return png
    chunk = b"tEXt" + b"serial\0" + note.encode("latin-1")
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:-_END_CHUNK_BYTES] + packed + png[-_END_CHUNK_BYTES:]
