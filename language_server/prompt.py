"""Chat messages -> token ids with room for images. Templates are code, not Jinja: a template is a program.

Special tokens come only from the template, by id; what users wrote is encoded as plain text. Between two special
tokens all text is encoded as one string, so that the ids are those of tokenising the whole rendered prompt. Knows
nothing of features or scheduling.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Final, Protocol

from common.service.errors import CheckpointError, InvalidRequest
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import ChatMessage, ContentPart, RawPrompt

IMAGE_START: Final = "<img>"
IMAGE_END: Final = "</img>"
IMAGE_CONTEXT: Final = "<IMG_CONTEXT>"

ROLES: Final = frozenset({"system", "user", "assistant", "tool"})

THINKING_MESSAGE: Final = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason \
through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer \
from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone \
and not reference the thinking section."""
"""The system message with which released models think first (INTERNVL.md section 5.2)."""

TOOLS_MESSAGE: Final = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""What Qwen's language models were trained to see at the end of the system message where there are tools, a line of
JSON each (Qwen3's published chat template)."""


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by its text."""

    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the placeholders of neighbouring tiles of one image go."""

    image_index: int
    first_tile: int = 0
    end_tile: int | None = None  # None: all from the first on


Segment = str | Special | Piece


class Template(Protocol):
    """A chat format (INTERNVL.md section 5.1)."""

    @property
    def thinks_in_tags(self) -> bool:
        """Whether a reply that thinks does so as ``THINKING_MESSAGE`` asks, in text that begins with ``<think>``."""
        ...

    @property
    def has_tools(self) -> bool:
        """Whether it says how tools are offered and called."""
        ...

    @property
    def hidden_header(self) -> tuple[tuple[str, ...], str] | None:
        """Special tokens that open, and the one that closes, a header in the reply that is no text."""
        ...

    @property
    def reply_header(self) -> tuple[str | Special, ...]:
        """What stands before the text of a reply that may not think first."""
        ...

    def render(self, messages: Iterable[ChatMessage]) -> Iterator[Segment]:
        """The prompt up to and including the opened assistant turn."""
        ...


class InternVL25Template:
    """``internvl2_5``: every message ends with ``<|im_end|>`` and a newline. Calls and results as in Qwen's own format:
    results that follow one another share a user's turn."""

    thinks_in_tags = True
    has_tools = True
    hidden_header = None
    reply_header = ()

    def render(self, messages: Iterable[ChatMessage]) -> Iterator[Segment]:
        for are_results, turns in groupby(messages, key=lambda message: message.role == "tool"):
            for role, content in [("user", _results(turns))] if are_results else map(_turn, turns):
                yield Special("<|im_start|>")
                yield f"{role}\n"
                yield from content
                yield Special("<|im_end|>")
                yield "\n"
        yield Special("<|im_start|>")
        yield "assistant\n"


def _turn(message: ChatMessage) -> tuple[str, Iterator[Segment]]:
    return message.role, _content_and_calls(message)


def _content_and_calls(message: ChatMessage) -> Iterator[Segment]:
    yield from _content(message)
    has_content = any(part.WhichOneof("part") != "text" or part.text for part in message.parts)
    for index, call in enumerate(message.tool_calls):
        start = "\n" if has_content or index else ""
        yield f'{start}<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


def _results(messages: Iterable[ChatMessage]) -> Iterator[Segment]:
    for index, message in enumerate(messages):
        yield "\n<tool_response>\n" if index else "<tool_response>\n"
        yield from _content(message)
        yield "\n</tool_response>"


class GptOssTemplate:
    """``internvl3_5_gpt_oss``: the reply names its channel first."""

    thinks_in_tags = False  # but in a channel of its own
    has_tools = False  # but TypeScript, in a developer's turn
    hidden_header = (("<|start|>", "<|channel|>"), "<|message|>")
    reply_header = (Special("<|channel|>"), "final", Special("<|message|>"))

    def render(self, messages: Iterable[ChatMessage]) -> Iterator[Segment]:
        for message in messages:
            yield Special("<|start|>")
            yield message.role
            if message.role == "assistant":
                yield Special("<|channel|>")
                yield "final"
            yield Special("<|message|>")
            yield from _content(message)
            yield Special("<|end|>")
        yield Special("<|start|>")
        yield "assistant"


TEMPLATES: Final[dict[str, Template]] = {
    "internvl2_5": InternVL25Template(),
    "internvl3_5_gpt_oss": GptOssTemplate(),
}


def _content(message: ChatMessage) -> Iterator[Segment]:
    for part in message.parts:
        pieces = _pieces(part)
        if pieces is None:
            yield part.text
            continue
        yield Special(IMAGE_START)
        yield from pieces
        yield Special(IMAGE_END)
        if not message.inline_images:
            yield "\n"


def _pieces(part: ContentPart) -> list[Piece] | None:
    """What a block of images is made of; None: the part is text."""
    match part.WhichOneof("part"):
        case "image_index":
            return [Piece(part.image_index)]
        case "block":
            return [
                Piece(
                    piece.image_index, piece.first_tile, piece.first_tile + piece.num_tiles if piece.num_tiles else None
                )
                for piece in part.block.pieces
            ]
    return None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt whose tiles have no size yet: runs of ids, and pieces of images between them."""

    runs: tuple[list[int] | Piece, ...]
    image_token_id: int

    @property
    def num_text_tokens(self) -> int:
        return sum(len(run) for run in self.runs if isinstance(run, list))

    def until(self, num_tiles: Sequence[int | None]) -> "Prompt":
        """What stands before the first tile that is not among the first ``num_tiles[i]`` of image ``i``; None: all."""
        runs: list[list[int] | Piece] = []
        for run in self.runs:
            if isinstance(run, Piece):
                known = num_tiles[run.image_index]
                if known is not None and (run.end_tile is None or run.end_tile > known):
                    runs += [replace(run, end_tile=known)] if known > run.first_tile else []
                    break
            runs.append(run)
        return Prompt(tuple(runs), self.image_token_id)

    def lay_out(
        self, tile_tokens: Sequence[Sequence[int]], tile_hashes: Sequence[Sequence[bytes]]
    ) -> tuple[list[int], ImageSpans]:
        """Ids with ``tile_tokens[i][t]`` placeholders for tile ``t`` of image ``i``, and where they lie: a span for
        neighbouring tiles of one hash.

        The rule rows == placeholders is made true here: both counts come from the same place.
        """
        first_rows = [list(accumulate(sizes, initial=0)) for sizes in tile_tokens]
        ids: list[int] = []
        spans: list[ImageSpan] = []
        for run in self.runs:
            if isinstance(run, list):
                ids += run
                continue
            starts = first_rows[run.image_index]
            tiles = range(run.first_tile, len(starts) - 1 if run.end_tile is None else run.end_tile)
            for tile_hash, alike in groupby(tiles, tile_hashes[run.image_index].__getitem__):
                first, *others = alike
                start, end = starts[first], starts[(others or [first])[-1] + 1]
                spans.append(ImageSpan(run.image_index, len(ids), end - start, tile_hash, start))
                ids += [self.image_token_id] * (end - start)
        return ids, ImageSpans(spans)


class PromptBuilder:
    """Renders and tokenises for one checkpoint.

    Args:
        template: name of the chat format, from the checkpoint's config.
        system_message: what a conversation without a system message starts with; None: nothing.

    Raises:
        CheckpointError: unknown template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, system_message: str | None) -> None:
        if template not in TEMPLATES:
            raise CheckpointError(f"config.json: template: unknown chat format {template[:64]!r}")
        self._tokenizer = tokenizer
        self._template = TEMPLATES[template]
        self._system_message = system_message
        self._image_token_id = tokenizer.token_id(IMAGE_CONTEXT)

    @property
    def hidden_header(self) -> tuple[frozenset[int], int] | None:
        """Ids that open and close a header of the reply; see ``IncrementalDetokenizer``."""
        if self._template.hidden_header is None:
            return None
        openers, closer = self._template.hidden_header
        token_id = self._tokenizer.token_id
        return frozenset(token_id(opener) for opener in openers), token_id(closer)

    @property
    def reply_header(self) -> tuple[str | int, ...]:
        """Text and ids that every reply of which the form is given begins with."""
        token_id, parts = self._tokenizer.token_id, self._template.reply_header
        return tuple(token_id(part.text) if isinstance(part, Special) else part for part in parts)

    def build(
        self,
        messages: Sequence[ChatMessage],
        num_tiles: Sequence[int],
        *,
        thinking: bool = False,
        tools: Sequence[str] = (),
    ) -> Prompt:
        """Tokenise a conversation in which each of the ``num_tiles[i]`` tiles of image ``i`` has exactly one place,
        behind that of the tile before.

        Args:
            thinking: the system message asks for thoughts first; a client's own follows in the same turn.
            tools: JSON of each that the system message offers, behind everything else it says.

        Raises:
            InvalidRequest: no messages, an unknown role, an image outside a user message, tiles and places that do
                not match (``image_marker_mismatch``), or thoughts or tools of a chat format that has none in its text.
        """
        _check(messages, num_tiles)
        if thinking and not self._template.thinks_in_tags:
            message = "thinking is not supported with the chat format of this model"
            raise InvalidRequest(message, code="unsupported_parameter", param="chat_template_kwargs.enable_thinking")
        self._check_tools(messages, tools)
        runs: list[list[int] | Piece] = [list(self._tokenizer.prefix_ids)]
        text = ""
        opened = _with_thinking_message(messages) if thinking else self._with_system_message(messages)
        if tools:
            opened = _with_tools(opened, tools)
        for segment in self._template.render(opened):
            if isinstance(segment, str):
                text += segment
                continue
            ids = self._tokenizer.encode(text) if text else []
            text = ""
            if isinstance(segment, Special):
                ids.append(self._tokenizer.token_id(segment.text))
            _extend(runs, ids)
            if isinstance(segment, Piece):
                runs.append(segment)
        if text:
            _extend(runs, self._tokenizer.encode(text))
        return Prompt(tuple(runs), self._image_token_id)

    def build_raw(self, raw: RawPrompt, vocab_size: int) -> Prompt:
        """Tokenise a prompt that has no chat format: text in which only grounding tokens are special, or ids.

        Raises:
            InvalidRequest: an id outside the vocabulary, or the placeholder of an image.
        """
        ids = list(raw.token_ids.ids)
        if raw.WhichOneof("prompt") == "text":
            ids = [*(self._tokenizer.prefix_ids if raw.add_special_tokens else ()), *self._tokenizer.encode(raw.text)]
        if any(token_id >= vocab_size for token_id in ids):
            raise InvalidRequest(f"a token id is outside the vocabulary of {vocab_size}", param="messages")
        if self._image_token_id in ids:
            raise InvalidRequest("the prompt holds the placeholder of an image", param="messages")
        return Prompt((ids,), self._image_token_id)

    def _check_tools(self, messages: Sequence[ChatMessage], tools: Sequence[str]) -> None:
        if self._template.has_tools:
            return
        called = [f"messages[{i}].tool_calls" for i, message in enumerate(messages) if message.tool_calls]
        for param in (["tools"] if tools else []) + called:
            message = "tools are not supported with the chat format of this model"
            raise InvalidRequest(message, code="unsupported_parameter", param=param)

    def _with_system_message(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        if self._system_message is None or any(message.role == "system" for message in messages):
            return messages
        system = ChatMessage(role="system", parts=[{"text": self._system_message}])
        return [system, *messages]


def _with_thinking_message(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    first, *others = messages
    if first.role != "system":
        return [ChatMessage(role="system", parts=[{"text": THINKING_MESSAGE}]), *messages]
    return [ChatMessage(role="system", parts=[{"text": f"{THINKING_MESSAGE}\n\n"}, *first.parts]), *others]


def _with_tools(messages: Sequence[ChatMessage], tools: Sequence[str]) -> Sequence[ChatMessage]:
    offer = {"text": TOOLS_MESSAGE.format(tools="\n".join(tools))}
    first, *others = messages
    if first.role != "system":
        return [ChatMessage(role="system", parts=[offer]), *messages]
    return [ChatMessage(role="system", parts=[*first.parts, {"text": "\n\n"}, offer]), *others]


def _extend(runs: list[list[int] | Piece], ids: list[int]) -> None:
    if not ids:
        return
    if runs and isinstance(runs[-1], list):
        runs[-1] += ids
    else:
        runs.append(ids)


def _check(messages: Sequence[ChatMessage], num_tiles: Sequence[int]) -> None:
    if not messages:
        raise InvalidRequest("a conversation needs at least one message", param="messages")
    pieces: list[Piece] = []
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"unknown role {message.role[:64]!r}", param=f"messages[{position}].role")
        blocks = [block for part in message.parts if (block := _pieces(part)) is not None]
        if blocks and message.role != "user":
            raise InvalidRequest("images belong in user messages", param=f"messages[{position}]")
        if not all(blocks):
            raise InvalidRequest("a block without an image", param=f"messages[{position}]")
        pieces += [piece for block in blocks for piece in block]
    _check_places(pieces, num_tiles)


def _check_places(pieces: Sequence[Piece], num_tiles: Sequence[int]) -> None:
    """Every tile of every image has one place, and those of one image come in order."""
    num_placed = [0] * len(num_tiles)
    for piece in pieces:
        index = piece.image_index
        if index >= len(num_tiles):
            raise _mismatch(f"image {index} of {len(num_tiles)}")
        end_tile = num_tiles[index] if piece.end_tile is None else piece.end_tile
        if piece.first_tile != num_placed[index] or not piece.first_tile < end_tile <= num_tiles[index]:
            raise _mismatch(f"tiles {piece.first_tile} to {end_tile} of the {num_tiles[index]} of image {index}")
        num_placed[index] = end_tile
    for index, (placed, number) in enumerate(zip(num_placed, num_tiles, strict=True)):
        if placed != number:
            raise _mismatch(f"{placed} places for the {number} tiles of image {index}")


def _mismatch(detail: str) -> InvalidRequest:
    message = f"images and their places in the messages do not match: {detail}"
    return InvalidRequest(message, code="image_marker_mismatch", param="messages")
