"""What tools a client offers and whether they may, or must, be called (API.md section 2).

``required`` and a named tool are enforced by a grammar, with arguments that satisfy the tool's schema. ``auto`` leaves
the reply free, unless a ``strict`` tool or ``parallel_tool_calls: false`` promises something of the calls in it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from common.service.errors import InvalidRequest
from protos.language_pb2 import Grammar, ToolCalls, ToolSchema
from router.api.grammar import load_schema
from router.api.schemas import NULL, ChatCompletionRequest, Function, Tool

MAX_TOOLS_BYTES: Final = 96 * 2**10
"""All tools of a request as the prompt shows them; a grammar holds their schemas, too."""
NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
"""OpenAI's meaning of a function without ``parameters``."""
ANY_OBJECT: Final = '{"type": "object"}'
_TOOLS: Final = "tools"
_CHOICE: Final = "tool_choice"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the language server is told."""

    offered: Sequence[str] = ()  # JSON of each
    grammar: Grammar | None = None  # None: free text, in which there may be calls


def callable_names(request: ChatCompletionRequest) -> frozenset[str]:
    """Tools whose calls are told from text: none, unless the reply may call one."""
    if request.tool_choice == "none":
        return frozenset()
    return frozenset(tool.function.name for tool in request.tools or [] if tool.function is not None)


def translate_tools(request: ChatCompletionRequest) -> ToolUse:
    """Raises InvalidRequest: malformed, too large, or not a kind of tool or choice that is supported."""
    choice = request.tool_choice
    if choice == "none":  # tools that may not be called change nothing
        return ToolUse()
    if isinstance(choice, str) and choice not in ("auto", "required"):
        raise InvalidRequest(f"{_CHOICE}: 'none', 'auto', 'required' or a function", param=_CHOICE)
    named = _named(request)
    functions = [_function(tool, f"{_TOOLS}[{index}]") for index, tool in enumerate(request.tools or [])]
    schemas = [_schema(function, f"{_TOOLS}[{i}].function.parameters") for i, function in enumerate(functions)]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param=_TOOLS)
    if named is not None and named not in names:
        raise InvalidRequest(f"no tool is named {named}", param=f"{_CHOICE}.function.name")
    if choice == "required" and not functions:
        raise InvalidRequest("a call is required, but there are no tools", param=_CHOICE)
    if not functions:
        return ToolUse()
    offered = [_offer(function, schema) for function, schema in zip(functions, schemas, strict=True)]
    if sum(len(text.encode()) for text in offered) > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"all tools together may have at most {MAX_TOOLS_BYTES} bytes", param=_TOOLS)
    is_free = choice in (None, "auto")
    allows_many = request.parallel_tool_calls is not False and named is None
    if is_free and allows_many and not any(function.strict for function in functions):
        return ToolUse(offered)
    calls = ToolCalls(allows_many=allows_many, allows_text=is_free)
    for function, schema in zip(functions, schemas, strict=True):
        if named in (None, function.name):
            is_kept_to = function.strict or not is_free
            parameters = json.dumps(schema) if is_kept_to else ANY_OBJECT
            calls.tools.append(ToolSchema(name=function.name, parameters=parameters))
    return ToolUse(offered, Grammar(tool_calls=calls, param=_TOOLS))


def _named(request: ChatCompletionRequest) -> str | None:
    """The one tool that must be called."""
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return None
    if choice.type != "function":
        raise _unsupported(f"{_CHOICE}.type")
    if choice.function is None:
        raise InvalidRequest("function is required", param=f"{_CHOICE}.function")
    return choice.function.name


def _function(tool: Tool, param: str) -> Function:
    if tool.type != "function":
        raise _unsupported(f"{param}.type")
    if tool.function is None:
        raise InvalidRequest("function is required", param=f"{param}.function")
    return tool.function


def _schema(function: Function, param: str) -> dict[str, Any]:
    """Of the arguments, which are an object in any case."""
    if bytes(function.parameters) == bytes(NULL):
        return NO_PARAMETERS
    schema = load_schema(bytes(function.parameters), param)
    if schema.setdefault("type", "object") != "object":
        raise InvalidRequest("arguments are an object", param=f"{param}.type")
    return schema


def _offer(function: Function, schema: dict[str, Any]) -> str:
    """As templates of transformers write JSON."""
    given = msgspec.structs.asdict(function) | {"parameters": schema}
    shown = {name: given[name] for name in ("name", "description", "parameters") if given[name] is not None}
    return json.dumps({"type": "function", "function": shown}, ensure_ascii=False)


def _unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported by this server", code="unsupported_parameter", param=param)
