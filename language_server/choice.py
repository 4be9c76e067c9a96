"""One of the ``n`` replies of a request: tokens in, events' contents out, and what it cost.

Knows nothing of the engine's thread, of other choices or of the call they belong to.
"""

import time
from collections.abc import Collection

from language_server.detokenizer import IncrementalDetokenizer
from language_server.engine import StepOutput
from language_server.reasoning import ReasoningSplitter
from language_server.sequence import FinishReason, Sequence
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import Token, TokenLogprob


class Choice:
    """Text and times of one sequence. Times are monotonic seconds, None until they have come."""

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        detokenizer: IncrementalDetokenizer,
        splitter: ReasoningSplitter,
        tokenizer: Tokenizer,
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.num_tokens = 0
        self.num_replayed = 0  # of these, made by a server that was lost
        self.num_reasoning_tokens = 0  # tags included
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.is_finished = False
        self._detokenizer = detokenizer
        self._splitter = splitter
        self._tokenizer = tokenizer

    def replay(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Bring the text to where a lost server left it; says why the reply had ended, if it had.

        What the client has is dropped; what these tokens hold back comes with the next one, or with ``flush``.
        """
        for token_id in self.sequence.output_token_ids:
            self.num_tokens = self.num_replayed = self.num_tokens + 1
            if self._is_stop_token(token_id, eos_token_ids):
                return "stop"
            _, _, has_stopped = self._push(token_id)
            if has_stopped:
                return "stop"
        constraint = self.sequence.constraint
        if constraint is not None and constraint.is_finished:
            return "stop"
        return "length" if self.num_tokens >= self.sequence.sampling.max_tokens else None

    def take(self, output: StepOutput) -> tuple[Token | None, FinishReason | None]:
        """What the engine's output means for the client: a token, the end, or both."""
        if output.token_id is None:
            return None, output.finish_reason
        self.num_tokens += 1
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        # The token that stops is no text.
        is_text = output.finish_reason != "stop"
        reasoning, text, has_stopped = self._push(output.token_id) if is_text else ("", "", False)
        token = Token(choice=self.index, token_id=output.token_id, text=text, reasoning=reasoning)
        if output.logprob is not None:
            token.logprob.CopyFrom(self._logprob(output.token_id, output.logprob))
            token.top_logprobs.extend(self._logprob(*pair) for pair in output.top_logprobs)
        return token, "stop" if has_stopped else output.finish_reason

    def flush(self) -> tuple[str, str]:
        """Reasoning and text that were held back, when no more tokens come."""
        reasoning, text = self._splitter.push(self._detokenizer.flush())
        last_reasoning, last_text = self._splitter.flush()
        return reasoning + last_reasoning, text + last_text

    def _is_stop_token(self, token_id: int, eos_token_ids: Collection[int]) -> bool:
        """As in the engine: behind the end of a grammar there is nothing to ignore it for."""
        sampling = self.sequence.sampling
        ignores_eos = sampling.ignore_eos and self.sequence.constraint is None
        return token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not ignores_eos)

    def _push(self, token_id: int) -> tuple[str, str, bool]:
        """Reasoning and text of a token, and whether a stop string was found; those count in both, as in vLLM."""
        may_stop = self.num_tokens > self.sequence.sampling.min_tokens
        piece, has_stopped = self._detokenizer.push(token_id, may_stop=may_stop)
        was_thinking = self._splitter.is_thinking
        reasoning, text = self._splitter.push(piece)
        if was_thinking or self._splitter.is_thinking or reasoning:
            self.num_reasoning_tokens = self.num_tokens
        return reasoning, text, has_stopped

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        token_bytes = self._tokenizer.token_bytes(token_id)
        text = token_bytes.decode("utf-8", "replace")
        return TokenLogprob(token_id=token_id, text=text, logprob=logprob, token_bytes=token_bytes)
