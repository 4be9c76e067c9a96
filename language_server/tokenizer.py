"""The checkpoint's tokenizer as the server needs it: text that can place nothing, tokens as bytes.

Knows nothing of chat formats (prompt.py) or streams (detokenizer.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
from transformers import AutoTokenizer

from common.service.errors import CheckpointError, InvalidRequest

GROUNDING_TOKENS: Final = frozenset({"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})
"""Special tokens that users may type: grounding prompts need them and they place nothing (RELIABILITY.md 5.5)."""

STRUCTURE_TOKENS: Final = frozenset(
    {"<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"}
)
"""Neutral in user text whatever flags the checkpoint's file gives them."""

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Two views of one vocabulary: ids of special tokens by their text, and plain text without any of them.

    Args:
        backend: the tokenizer as transformers would use it.

    Raises:
        CheckpointError: its decoder is neither byte-level nor SentencePiece-like.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._plain = _without_structure(backend)
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._reserved_ids = self._special_ids - {backend.token_to_id(text) for text in GROUNDING_TOKENS}
        decoder = json.dumps(json.loads(backend.to_str())["decoder"])
        self._is_byte_level = "ByteLevel" in decoder
        if not self._is_byte_level and "ByteFallback" not in decoder:
            raise CheckpointError("tokenizer.json: the decoder is neither ByteLevel nor ByteFallback")
        self.prefix_ids: list[int] = backend.encode(
            ""
        ).ids  # what the tokenizer puts before every prompt: mostly nothing

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read ``tokenizer.json``, or convert the older vocabulary files of the InternVL format.

        Raises:
            CheckpointError: there is no tokenizer that can be read.
        """
        file = path / "tokenizer.json"
        try:
            if file.exists():
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"tokenizer: cannot be read ({type(error).__name__})") from error

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def token_id(self, text: str) -> int:
        """Id of a special token.

        Raises:
            CheckpointError: the vocabulary lacks it, so this checkpoint does not fit its prompt template.
        """
        token_id = self._backend.token_to_id(text)
        if token_id is None:
            raise CheckpointError(f"tokenizer: no token {text}")
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of text in which only grounding tokens are special. Releases the GIL; may be called from any thread.

        Raises:
            InvalidRequest: the vocabulary can spell a structure token only as itself.
        """
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._reserved_ids.isdisjoint(ids):
            raise InvalidRequest("the text holds a reserved token of the model", param="messages")
        return ids

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token(self, token_id: int) -> str:
        """How the vocabulary spells a token. Empty for an id the vocabulary pads up to."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self._backend.decode(token_ids, skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text. Empty for an id the vocabulary pads up to."""
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        return _byte_level_bytes(token) if self._is_byte_level else _sentencepiece_bytes(token)


def _without_structure(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that splits off no special token but those of grounding.

    ``encode_special_tokens`` spells out every token marked special; the marks are what is changed here.
    """
    description: dict[str, Any] = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        if token["content"] in GROUNDING_TOKENS:
            token["special"] = False
        elif token["content"] in STRUCTURE_TOKENS:
            token["special"] = True
    plain = tokenizers.Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True
    return plain


def _bytes_by_character() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES: Final = _bytes_by_character()


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
