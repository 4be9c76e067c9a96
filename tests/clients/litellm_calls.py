"""``ADDRESS QUESTION URL``: LiteLLM asks in all its ways about an image; what came of it, as JSON.

Run by the Python of LiteLLM's environment: knows nothing of ours.
"""

import asyncio
import json
import sys
from typing import Any

import litellm
import openai
from litellm.proxy.health_check import update_litellm_params_for_health_check

SCHEMA = {
    "name": "answer",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"seen": {"enum": ["number", "shape"]}},
        "required": ["seen"],
        "additionalProperties": False,
    },
}


def user(text: str, url: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
    }


def error_of(**request: Any) -> tuple[str, str]:
    """Its exception's class and text."""
    try:
        litellm.completion(**request)
    except openai.OpenAIError as error:
        return type(error).__name__, str(error)
    return "", ""


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


async def asked_async(request: dict[str, Any]) -> dict[str, Any]:
    reply = await litellm.acompletion(**request)
    stream = await litellm.acompletion(**request, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    return {
        "async": reply.choices[0].message.content,
        "async stream": text_of(chunks),
        "streamed usage": chunks[-1].usage.total_tokens,
    }


def all_calls(provider: str, address: str, question: str, url: str) -> dict[str, Any]:
    where = {"model": f"{provider}/nano", "api_base": f"{address}/v1", "api_key": "none"}
    request = {**where, "messages": [user(question, url)], "temperature": 0}
    reply = litellm.completion(**request)
    schema = {"type": "json_schema", "json_schema": SCHEMA}
    router = litellm.Router(model_list=[{"model_name": "any", "litellm_params": where}])
    probe = update_litellm_params_for_health_check({}, dict(where))
    healthy = asyncio.run(litellm.ahealth_check(probe, mode="chat"))
    return {
        "sync": reply.choices[0].message.content,
        "usage": reply.usage.total_tokens,
        "stream": text_of(list(litellm.completion(**request, stream=True))),
        **asyncio.run(asked_async(request)),
        "router": router.completion(model="any", messages=[user(question, url)], temperature=0)
        .choices[0]
        .message.content,
        "schema": litellm.completion(**request, response_format=schema).choices[0].message.content,
        "models": litellm.get_valid_models(
            check_provider_endpoint=True,
            custom_llm_provider=provider,
            api_base=f"{address}/v1",
            api_key="none",
        ),
        "health": healthy.get("error"),
        "no such model": error_of(**{**request, "model": f"{provider}/gpt-17"}, max_retries=2),
        "out of bounds": error_of(**{**request, "temperature": 9}, max_retries=2),
        "no image": error_of(**{**request, "messages": [user(question, "data:image/png;base64,AAAA")]}, max_retries=2),
    }


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    print(json.dumps({provider: all_calls(provider, *sys.argv[1:]) for provider in ("hosted_vllm", "openai")}))
