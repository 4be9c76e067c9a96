"""What a client has of a reply, so that another language server can go on where a lost one stopped.

Knows nothing of servers. Holds the ids of a running request's tokens, at most ``max_tokens`` for each of its choices.
"""

import dataclasses
import secrets
from array import array

from protos.language_pb2 import Continuation, Finished, GenerateRequest, Token
from router.request import ChatRequest


class Progress:
    """What was relayed of each choice."""

    def __init__(self, num_choices: int) -> None:
        self._token_ids = [array("I") for _ in range(num_choices)]
        self._is_finished = [False] * num_choices

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(map(len, self._token_ids))

    @property
    def is_done(self) -> bool:
        """Nothing is missing."""
        return all(self._is_finished)

    def token(self, token: Token) -> None:
        """A token is on its way to the client."""
        self._token_ids[token.choice].append(token.token_id)

    def finished(self, finished: Finished) -> None:
        """The end of a choice is on its way to the client."""
        self._is_finished[finished.choice] = True

    def rest_of(self, request: ChatRequest) -> ChatRequest:
        """The request for what is missing, as another server is asked. It has an id of its own: a server that knows
        the first one would take nothing for it again, and nothing that was meant for the first can reach it."""
        generate = GenerateRequest()
        generate.CopyFrom(request.generate)
        generate.request_id = secrets.token_bytes(len(request.generate.request_id))
        generate.continuations.extend(
            Continuation(choice=choice, output_token_ids=token_ids, is_finished=is_finished)
            for choice, (token_ids, is_finished) in enumerate(zip(self._token_ids, self._is_finished, strict=True))
            if token_ids or is_finished
        )
        return dataclasses.replace(request, generate=generate)
