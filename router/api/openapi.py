"""What this server answers, as OpenAPI 3.1: bodies of requests from the types that read them, errors from one shape.

The types check more than a schema can say, such as what depends on the model; API errors tell that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from router.api.schemas import UNSUPPORTED, ChatCompletionRequest
from router.api.text_schemas import UNSUPPORTED_COMPLETION, CompletionRequest, DetokenizeRequest, TokenizeRequest

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_REF: Final = "#/components/schemas/{name}"


class ErrorDetail(Struct):
    """What went wrong. ``param`` is the path of the field that is at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct):
    """The body of every error, and of ``event: error`` inside a stream."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route."""

    method: Literal["get", "post"]
    path: str
    summary: str
    answers: Sequence[str] = (_JSON,)  # media types of a 200; none: it has no body
    request: type[Struct] | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)  # fields that are refused unless they ask for nothing
    is_open: bool = False  # needs no key
    is_playground: bool = False  # only where there is one
    is_probe: bool = False  # a 503 without a body is an answer, too


OPERATIONS: Final = (
    Operation(
        *("post", "/v1/chat/completions", "The reply to a conversation with images and videos."),
        *((_JSON, _EVENTS), ChatCompletionRequest, UNSUPPORTED),
    ),
    Operation(
        *("post", "/v1/completions", "Text behind prompts that have no chat format."),
        *((_JSON, _EVENTS), CompletionRequest, UNSUPPORTED_COMPLETION),
    ),
    Operation("post", "/tokenize", "The ids of a prompt or a conversation.", (_JSON,), TokenizeRequest),
    Operation("post", "/detokenize", "The text of ids.", (_JSON,), DetokenizeRequest),
    Operation("get", "/v1/models", "The names under which the model is served."),
    Operation("get", "/v1/models/{model_id}", "One of them."),
    Operation("get", "/live", "Whether this process runs.", (), is_open=True),
    Operation("get", "/health", "Whether requests can be served.", (), is_open=True, is_probe=True),
    Operation("get", "/health/deep", "Whether one tiny image and one token come through both tiers."),
    Operation("get", "/metrics", "Prometheus metrics.", ("text/plain",)),
    Operation("get", "/load", "How many requests are being worked on."),
    Operation("get", "/version", "Versions of this build and of its wire format."),
    Operation("get", "/openapi.json", "This document."),
    Operation("get", "/docs", "This document as a page.", ("text/html",)),
    Operation("get", "/", "A page to chat with the model.", ("text/html",), is_open=True, is_playground=True),
    Operation(
        *("get", "/ui/{name}", "A part of that page."),
        *(("text/css", "text/javascript", "image/svg+xml"),),
        is_open=True,
        is_playground=True,
    ),
    Operation("get", "/pipeline", "The servers, and where the time of the latest requests went.", is_playground=True),
)


def describe(*, has_keys: bool, has_playground: bool = False) -> dict[str, Any]:
    """The document.

    Args:
        has_keys: all routes that are not open need a bearer token.
        has_playground: and its routes.
    """
    operations = [operation for operation in OPERATIONS if has_playground or not operation.is_playground]
    requests = [operation.request for operation in operations if operation.request is not None]
    _, schemas = msgspec.json.schema_components([*requests, ErrorBody], ref_template=_REF)
    schemas["CompletionRequest"]["required"] = ["prompt"]  # which is read in a second step
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "DvD", "version": version("dvd-serve")},
        "paths": {operation.path: {operation.method: _describe(operation, has_keys)} for operation in operations},
        "components": {"schemas": _as_ecma(schemas)},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _as_ecma(schema: Any) -> Any:
    """Patterns as JSON Schema reads them: its ``$`` is the end and nothing else, Python's is ``\\Z``."""
    if isinstance(schema, dict):
        return {
            key: value.replace(r"\Z", "$") if key == "pattern" and isinstance(value, str) else _as_ecma(value)
            for key, value in schema.items()
        }
    return [_as_ecma(item) for item in schema] if isinstance(schema, list) else schema


def _describe(operation: Operation, has_keys: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation)}
    if has_keys:
        described["security"] = [] if operation.is_open else [{"key": []}]
    if operation.request is not None:
        schema = {"$ref": _REF.format(name=operation.request.__name__)}
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    if operation.refused:
        names = ", ".join(sorted(operation.refused))
        described["description"] = f"Refused with `unsupported_parameter` unless they ask for nothing: {names}."
    if operation.path.endswith("}"):
        name = operation.path.rpartition("{")[2].rstrip("}")
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    error = {"description": "An error.", "content": {_JSON: {"schema": {"$ref": _REF.format(name="ErrorBody")}}}}
    answer: dict[str, Any] = {"description": operation.summary}
    if operation.answers:
        answer["content"] = {media_type: {} for media_type in operation.answers}
    probe = {"503": {"description": "No."}} if operation.is_probe else {}
    return {"200": answer, **probe, "4XX": error, "5XX": error}
