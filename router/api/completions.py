"""``POST /v1/completions``: text behind raw prompts, without a chat format and without images."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from common.service.errors import InvalidRequest
from router.admission import HeldBytes
from router.api.answers import AnswerOptions, kept_alive
from router.api.chat import LARGE_BODY_BYTES, BodyEndpoint, ignored_header, in_thread_if, name_request, refuse_ignored
from router.api.completion_answers import AskedPrompt, CompletionAnswer, FullCompletion, PromptAnswer, StreamCompletion
from router.api.exchange import Exchange
from router.api.strict import unknown_inside
from router.api.text_schemas import CompletionRequest, TextPrompt, parse_completion
from router.api.translate import Origin
from router.api.translate_text import check_num_choices, prompt_params, translate_completion, with_param
from router.causes import cause_of
from router.record import RequestRecord
from router.request import ChatRequest


class CompletionEndpoint(BodyEndpoint):
    """Each prompt is admitted, generated and counted as a request of its own; one that fails ends them all."""

    async def _answer(self, exchange: Exchange, body: bytes, held: HeldBytes) -> None:
        exchange.record.stage = "admit"
        is_large = len(body) > LARGE_BODY_BYTES
        parsed, prompts, ignored = await in_thread_if(is_large, parse_completion, body)
        ignored += await in_thread_if(is_large, unknown_inside, exchange.headers, body, CompletionRequest)
        del body
        name_request(exchange, parsed)
        refuse_ignored(exchange, ignored)
        model = self._check_model(parsed.model)
        self._check_servers(has_media=False)
        check_num_choices(parsed, len(prompts), self._settings)
        deadline = self._deadline(exchange)
        origin = Origin(secrets.token_bytes(16), exchange.tenant, deadline)
        with ExitStack() as slots:
            asked = [
                AskedPrompt(
                    slot=slots.enter_context(self._admission.enter("text", deadline.remaining())),
                    record=record,
                    echo=prompt if parsed.echo and isinstance(prompt, str) else "",
                )
                for prompt, record in zip(prompts, _records(exchange, prompts), strict=True)
            ]
            requests: list[ChatRequest]
            requests = await in_thread_if(
                is_large, translate_completion, parsed, prompts, origin, model, self._settings
            )
            exchange.charge(sum(request.max_num_tokens for request in requests), 0)
            for prompt, request in zip(asked, requests, strict=True):
                prompt.slot.weigh(request.num_prompt_tokens, 0)
            answer = self._make_answer(exchange, parsed, asked, ignored_header(ignored))
            async with kept_alive(answer):
                await self._run(requests, asked, answer)
            await answer.end()

    def _make_answer(
        self,
        exchange: Exchange,
        parsed: CompletionRequest,
        asked: Sequence[AskedPrompt],
        headers: Mapping[str, str],
    ) -> CompletionAnswer:
        options = AnswerOptions.of(
            parsed.as_chat(),
            model=self._models.name_for(parsed.model),
            headers=headers,
            settings=self._settings,
        )
        return StreamCompletion(exchange, asked, options) if parsed.stream else FullCompletion(exchange, asked, options)

    async def _run(
        self, requests: Sequence[ChatRequest], asked: Sequence[AskedPrompt], answer: CompletionAnswer
    ) -> None:
        """All prompts at once. Raises DvdError: what one of them failed of."""
        params = prompt_params(len(requests))
        try:
            async with asyncio.TaskGroup() as group:
                for index, (request, prompt) in enumerate(zip(requests, asked, strict=True)):
                    group.create_task(self._run_one(request, PromptAnswer(answer, index), prompt.record, params[index]))
        except BaseExceptionGroup as errors:
            raise cause_of(errors) from None

    async def _run_one(self, request: ChatRequest, answer: PromptAnswer, record: RequestRecord, param: str) -> None:
        try:
            await self._pipeline.run(request, answer, record)
        except InvalidRequest as error:
            raise with_param(error, param) from None


def _records(exchange: Exchange, prompts: Sequence[TextPrompt]) -> list[RequestRecord]:
    """Of each prompt; the first one's is that of the exchange."""
    first = exchange.record
    exchange.other_records = [
        RequestRecord(f"{first.request_id}-{index}", first.received_at, stage="admit", is_chat=True)
        for index in range(1, len(prompts))
    ]
    return [first, *exchange.other_records]
