"""A reply that thinks first, divided into thoughts and answer while it grows. Works on text, whatever its pieces are.

A reply thinks if it begins with ``<think>``; what stands up to the first ``</think>`` are thoughts, the rest is the
answer, and blank space around both is the format's, not theirs. Thoughts that were never closed are thoughts to their
end. Everything else is answer, to the letter: a tag that is mentioned later, and a ``</think>`` that nothing opened,
since no chat format of ours opens it for the model, and what was streamed as answer cannot be taken back.
"""

from enum import Enum, auto
from typing import Final

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
MAX_LEADING_BLANKS: Final = 16
"""A reply that begins with more of them does not think: text is held back only so far."""


class _Part(Enum):
    UNDECIDED = auto()
    THOUGHTS = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Takes the pieces of one reply. Holds back at most ``MAX_LEADING_BLANKS`` and an incomplete tag.

    Args:
        is_active: False: everything is answer.
    """

    def __init__(self, is_active: bool = True) -> None:
        self._part = _Part.UNDECIDED if is_active else _Part.ANSWER
        self._skips_blanks = False
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """The text so far ends inside thoughts."""
        return self._part is _Part.THOUGHTS

    def push(self, text: str) -> tuple[str, str]:
        """Thoughts and answer that became certain with this piece; the thoughts come first."""
        if self._part is _Part.ANSWER and not self._skips_blanks:
            return "", text
        self._held += text
        thoughts = answer = ""
        if self._part is _Part.UNDECIDED:
            self._decide()
        if self._part is _Part.THOUGHTS:
            thoughts = self._think()
        if self._part is _Part.ANSWER:
            answer = self._take(len(self._held)) if self._is_past_blanks() else ""
        return thoughts, answer

    def flush(self) -> tuple[str, str]:
        """What was held back, when no more text comes."""
        text = self._take(len(self._held))
        return (text, "") if self.is_thinking else ("", text)

    def _decide(self) -> None:
        body = self._held.lstrip()
        may_open = len(self._held) - len(body) <= MAX_LEADING_BLANKS
        if may_open and body.startswith(OPEN):
            self._enter(_Part.THOUGHTS, body.removeprefix(OPEN))
        elif not may_open or not OPEN.startswith(body):
            self._part = _Part.ANSWER

    def _think(self) -> str:
        if not self._is_past_blanks():
            return ""
        thoughts, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._enter(_Part.ANSWER, rest)
            return thoughts.removesuffix("\n")
        tag_at = self._held.rfind(CLOSE[0])
        end = tag_at if tag_at >= 0 and CLOSE.startswith(self._held[tag_at:]) else len(self._held)
        return self._take(end - 1 if self._held.endswith("\n", 0, end) else end)

    def _enter(self, part: _Part, rest: str) -> None:
        self._part, self._held = part, rest
        self._skips_blanks = True

    def _is_past_blanks(self) -> bool:
        """Drops blank space before this part; True once the part has text of its own."""
        if self._skips_blanks:
            self._held = self._held.lstrip()
            self._skips_blanks = not self._held
        return not self._skips_blanks

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
