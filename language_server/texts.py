"""Prompts -> ids and ids -> text, for whoever wants to know without generating: the calls Tokenize and Detokenize.

Knows nothing of the engine. What it answers is what ``Generation`` would compute, as both ask ``PromptBuilder``.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

from common.service.errors import InvalidRequest, Overloaded
from language_server.prompt import Prompt, PromptBuilder
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest

MAX_WAITING: Final = 64
"""Calls at once. They share threads with the prompts of requests, which must not wait long for them."""
MAX_REPLY_TOKENS: Final = 2**20
"""More than any context holds; and who relays them must not stand still for long."""
_ResultT = TypeVar("_ResultT")


class Texts:
    """Answers for one checkpoint.

    Args:
        tokenising: where the work is done; its threads release the GIL.
        tokens_per_tile: of images, before a Flash model compresses any.
        vocab_size: of the model, which may be larger than the tokenizer's.
    """

    def __init__(
        self,
        prompts: PromptBuilder,
        tokenizer: Tokenizer,
        tokenising: Executor,
        *,
        tokens_per_tile: int,
        vocab_size: int,
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._tokenising = tokenising
        self._tokens_per_tile = tokens_per_tile
        self._vocab_size = vocab_size
        self._num_waiting = 0

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Ids of a prompt.

        Raises:
            InvalidRequest: as ``PromptBuilder.build`` and ``build_raw``; or more than ``MAX_REPLY_TOKENS``.
            Overloaded: too many calls at once.
        """

        def tokenize() -> TokenizeReply:
            _check_length(sum(request.num_tiles) * self._tokens_per_tile)  # before a list is made of it
            ids = self._lay_out(request)
            _check_length(len(ids))
            token_strs = [self._tokenizer.token(token_id) for token_id in ids] if request.return_token_strs else []
            return TokenizeReply(token_ids=ids, token_strs=token_strs)

        return await self._in_thread(tokenize)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        """Text of ids.

        Raises:
            InvalidRequest: an id is outside the vocabulary.
            Overloaded: too many calls at once.
        """

        def detokenize() -> DetokenizeReply:
            for index, token_id in enumerate(request.token_ids):
                if token_id >= self._vocab_size:
                    message = f"a token id is outside the vocabulary of {self._vocab_size}"
                    raise InvalidRequest(message, param=f"tokens[{index}]")
            return DetokenizeReply(text=self._tokenizer.decode(list(request.token_ids)))

        return await self._in_thread(detokenize)

    def _lay_out(self, request: TokenizeRequest) -> list[int]:
        tile_tokens = [[self._tokens_per_tile] * num_tiles for num_tiles in request.num_tiles]
        ids, _ = self._build(request).lay_out(tile_tokens, [[b""] * len(sizes) for sizes in tile_tokens])
        return ids

    def _build(self, request: TokenizeRequest) -> Prompt:
        if request.HasField("raw"):
            return self._prompts.build_raw(request.raw, self._vocab_size)
        return self._prompts.build(request.messages, request.num_tiles, thinking=request.thinking, tools=request.tools)

    async def _in_thread(self, work: Callable[[], _ResultT]) -> _ResultT:
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded("too many texts are being read")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenising, work)
        finally:
            self._num_waiting -= 1


def _check_length(num_tokens: int) -> None:
    if num_tokens > MAX_REPLY_TOKENS:
        message = f"the prompt has {num_tokens} tokens, at most {MAX_REPLY_TOKENS} can be told"
        raise InvalidRequest(message, code="context_length_exceeded", param="messages")
