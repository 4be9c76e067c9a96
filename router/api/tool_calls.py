"""Calls of tools, told from the text of a reply while it grows: JSON with ``name`` and ``arguments`` inside tags.

What does not read as the call of a tool that was offered stays text, to the letter. Arguments are passed on as they
come, and nothing that was passed on is taken back: arguments that are no JSON are for the client to notice, as with
OpenAI. Works on text, whatever its pieces are; blank space around a call is the format's.
"""

import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby
from typing import Any, Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL: Final = re.compile(rf"\s*\}}\s*{CLOSE}")


@dataclass(frozen=True, slots=True)
class CallPiece:
    """Of the ``index``-th call: its id and name come with its first piece only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def delta(self) -> dict[str, Any]:
        """As one of ``delta.tool_calls``."""
        function = {"arguments": self.arguments}
        if self.id is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": {"name": self.name, **function}}


Divided = tuple[str, list[CallPiece]]


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # behind the opening tag
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments


class ToolCallParser:
    """Takes the pieces of one reply.

    Args:
        names: of the tools that may be called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.num_calls = 0
        self._names = names
        self._state = _State.TEXT
        self._held = ""  # in TEXT blank space and what may be a tag; in HEAD what stands behind the tag
        self._blanks = ""  # before the tag
        self._arguments = _ObjectEnd()

    def push(self, text: str) -> Divided:
        """Text and calls that became certain with this piece."""
        self._held += text
        texts: list[str] = []
        pieces: list[CallPiece] = []
        while self._step(texts, pieces):
            pass
        return "".join(texts), [_join(of_call) for _, of_call in groupby(pieces, lambda piece: piece.index)]

    def flush(self) -> Divided:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            call = self._whole_call(held)
            return ("", [call]) if call is not None else (self._blanks + OPEN + held, [])
        if self._state is _State.TAIL or (self.num_calls and not held.strip()):
            return "", []
        return held, []

    def _step(self, texts: list[str], pieces: list[CallPiece]) -> bool:
        """Use up some of what is held; False if nothing more can be done with it."""
        match self._state:
            case _State.TEXT:
                return self._read_text(texts)
            case _State.HEAD:
                return self._read_head(texts, pieces)
            case _State.ARGUMENTS:
                return self._read_arguments(pieces)
            case _State.TAIL:
                return self._read_tail()

    def _read_text(self, texts: list[str]) -> bool:
        text, tag, rest = self._held.partition(OPEN)
        if not tag:
            certain = self._held[: len(self._held) - _overlap(self._held)].rstrip()
            texts.append(certain)
            self._held = self._held[len(certain) :]
            return False
        certain = text.rstrip()
        texts.append(certain)
        self._blanks, self._held = text[len(certain) :], rest
        self._state = _State.HEAD
        return True

    def _read_head(self, texts: list[str], pieces: list[CallPiece]) -> bool:
        head = _HEAD.match(self._held)
        if head is not None and head["name"] in self._names:
            pieces.append(self._begin(head["name"], ""))
            self._held = self._held[head.end() :]
            self._arguments, self._state = _ObjectEnd(), _State.ARGUMENTS
            return True
        block, tag, rest = self._held.partition(CLOSE)
        body = block.lstrip()
        if head is None and not tag and (not body or body.startswith("{")):
            return False  # it may become one
        call = self._whole_call(block) if tag else None
        self._state = _State.TEXT
        if call is None:
            texts.append(self._blanks + OPEN)
        else:
            pieces.append(call)
            self._held = rest
        return True

    def _read_arguments(self, pieces: list[CallPiece]) -> bool:
        end = self._arguments.find(self._held)
        arguments = self._held if end is None else self._held[:end]
        self._held = self._held[len(arguments) :]
        if arguments:
            pieces.append(CallPiece(self.num_calls - 1, arguments))
        if end is None:
            return False
        self._state = _State.TAIL
        return True

    def _read_tail(self) -> bool:
        tail = _TAIL.match(self._held)
        if tail is None and ("}" + CLOSE).startswith("".join(self._held.split())):
            return False
        self._held = self._held[tail.end() :] if tail is not None else self._held
        self._state = _State.TEXT
        return True

    def _whole_call(self, block: str) -> CallPiece | None:
        """A call whose keys come in another order, or that has no arguments."""
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("arguments", {}), dict):
            return None
        if call.get("name") not in list(self._names):
            return None
        return self._begin(call["name"], json.dumps(call.get("arguments", {}), ensure_ascii=False))

    def _begin(self, name: str, arguments: str) -> CallPiece:
        self.num_calls += 1
        return CallPiece(self.num_calls - 1, arguments, f"call_{secrets.token_hex(12)}", name)


def _join(pieces: Iterable[CallPiece]) -> CallPiece:
    """Pieces of one call."""
    first, *others = pieces
    return replace(first, arguments=first.arguments + "".join(piece.arguments for piece in others))


class _ObjectEnd:
    """Looks for the end of a JSON object, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """Behind its last brace in ``text``, which goes on where the last one ended; None: it has not come."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = character == "\\"
                self._is_string = character != '"'
            elif character == '"':
                self._is_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


def _overlap(text: str) -> int:
    """Length of the longest end of ``text`` with which the tag begins."""
    return next((length for length in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:length])), 0)
