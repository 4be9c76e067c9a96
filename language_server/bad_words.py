"""Words that a reply may not hold, as sequences of tokens of which the last one is never chosen.

vLLM's rule: a word is spelled as the tokenizer spells it, at the beginning of a text and behind a space - here also if
that takes another number of tokens. A model that spells it in other tokens is not stopped. Knows nothing of logits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from common.service.errors import InvalidRequest


class BadWords:
    """Which tokens may not come next. Empty: all may.

    Args:
        spellings: ids of each word; none is empty.
    """

    def __init__(self, spellings: Iterable[Sequence[int]] = ()) -> None:
        self._last_ids = defaultdict[tuple[int, ...], set[int]](set)  # by the ids before
        for ids in spellings:
            self._last_ids[tuple(ids[:-1])].add(ids[-1])
        self._lengths = sorted({len(prefix) for prefix in self._last_ids})  # of what stands before last ids

    @classmethod
    def of(cls, words: Iterable[str], encode: Callable[[str], list[int]]) -> "BadWords":
        """Raises InvalidRequest for a word of blanks only, or one that cannot be spelled."""
        spellings: list[list[int]] = []
        for index, word in enumerate(words):
            if not word.strip():
                raise InvalidRequest("a word has more than blanks", param=f"bad_words[{index}]")
            try:
                plain, spaced = encode(word.lstrip()), encode(f" {word.lstrip()}")
            except InvalidRequest as error:
                raise InvalidRequest(error.message, param=f"bad_words[{index}]") from None
            if not plain:
                raise InvalidRequest("the model has no tokens for this word", param=f"bad_words[{index}]")
            spellings += [plain, spaced]
        return cls(spellings)

    def __bool__(self) -> bool:
        return bool(self._last_ids)

    @property
    def needs_history(self) -> bool:
        """Whether what may come next depends on what came."""
        return bool(self._lengths) and self._lengths[-1] > 0

    def forbidden(self, output_token_ids: Sequence[int]) -> list[int]:
        """Ids that would complete a word; a word that began in the prompt is none."""
        found = set[int]()
        for length in self._lengths:
            if length > len(output_token_ids):
                break
            before = tuple(output_token_ids[len(output_token_ids) - length :])
            found |= self._last_ids.get(before, set())
        return sorted(found)
