"""Tokens -> text, one token at a time: never half a character, never part of a stop string.

Works on bytes, so a token costs the same whether the text is short or long and whatever the model emits. Knows
nothing of sampling; the caller ends the sequence when a stop string was found.
"""

import codecs
from collections.abc import Sequence

from language_server.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one choice as it grows. All deltas joined are the full decoding, up to a stop string.

    Args:
        stop: strings that end the text; they and what follows are cut off.
        hidden: ids that open and the id that closes a header which is no text, such as a channel name. Applies only
            where special tokens are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        hidden: tuple[frozenset[int], int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._hidden = hidden if skip_special_tokens else None
        self._is_hidden = False
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # complete characters that may be the beginning of a stop string

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that became certain with this token, and whether a stop string was found.

        With ``may_stop`` off (``min_tokens``) stop strings in the text so far are ordinary text.
        """
        self._held += self._characters.decode(self._visible_bytes(token_id))
        if not may_stop:
            return self._take(len(self._held)), False
        if (position := self._find_stop()) is not None:
            text = self._held[:position]
            self._held = ""
            self._characters.reset()
            return text, True
        return self._take(len(self._held) - self._longest_open_stop()), False

    def flush(self) -> str:
        """What was held back, when no more tokens come. An incomplete character becomes U+FFFD."""
        self._held += self._characters.decode(b"", final=True)
        return self._take(len(self._held))

    def _visible_bytes(self, token_id: int) -> bytes:
        if self._hidden is not None:
            openers, closer = self._hidden
            self._is_hidden = token_id in openers or (self._is_hidden and token_id != closer)
        if self._is_hidden or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _find_stop(self) -> int | None:
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _longest_open_stop(self) -> int:
        """Length of the longest end of the held text with which some stop string begins."""
        return max((_overlap(self._held, stop) for stop in self._stop), default=0)

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
