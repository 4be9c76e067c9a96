"""What a client may ask the reply to be: ``response_format`` and vLLM's ``structured_outputs`` (API.md section 2).

Sizes are checked here. Whether a schema or a regular expression can be kept to is for the language server to say, which
compiles it; it names the field that is noted here.
"""

from typing import Any, Final, TypeVar

import msgspec

from common.service.errors import InvalidRequest
from protos.language_pb2 import Choices, Grammar
from router.api.schemas import NULL, ChatCompletionRequest, JsonSchema, ResponseFormat

MAX_SCHEMA_BYTES: Final = 64 * 2**10
MAX_SCHEMA_DEPTH: Final = 32
MAX_REGEX_BYTES: Final = 2**10
MAX_CHOICES: Final = 1024
MAX_CHOICES_BYTES: Final = 64 * 2**10

_FORMAT: Final = "response_format"
_OUTPUTS: Final = "structured_outputs"
_KINDS: Final = ("json", "regex", "choice")
# Values of other keys that ask for nothing. There is no second library that could be fallen back to.
_INERT: Final = (b"null", b"false")
_WITHOUT_MEANING: Final = frozenset({"disable_fallback"})
_T = TypeVar("_T")


def translate_grammar(request: ChatCompletionRequest) -> Grammar | None:
    """What the reply must be; None: free text.

    Raises:
        InvalidRequest: malformed, too large, two wishes at once, or a form that is not supported.
    """
    outputs = _wishes(request.structured_outputs or {})
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return _of_outputs(outputs)
    if outputs:
        raise InvalidRequest(f"{_FORMAT} and {_OUTPUTS} cannot both be given", param=_OUTPUTS)
    return _of_format(wanted)


def _of_format(wanted: ResponseFormat) -> Grammar:
    if wanted.type == "json_object":
        return Grammar(json_object=True, param=_FORMAT)
    if wanted.type != "json_schema":
        raise _unsupported(f"{_FORMAT}.type")
    raw, param = (wanted.json_schema or JsonSchema()).schema, f"{_FORMAT}.json_schema.schema"
    if bytes(raw) == bytes(NULL):
        raise InvalidRequest("a schema is required", param=param)
    return _of_schema(bytes(raw), param)


def _of_outputs(outputs: dict[str, bytes]) -> Grammar | None:
    if not outputs:
        return None
    if len(outputs) > 1:
        raise InvalidRequest(f"only one of {', '.join(outputs)} can be given", param=_OUTPUTS)
    [(kind, raw)] = outputs.items()
    param = f"{_OUTPUTS}.{kind}"
    if kind == "regex":
        return _of_regex(_decode(raw, str, param), param)
    if kind == "choice":
        return _of_choice(_decode(raw, list[str], param), param)
    # vLLM takes a schema as an object, and as text that holds one.
    return _of_schema(_decode(raw, str, param).encode() if raw.startswith(b'"') else raw, param)


def _wishes(outputs: dict[str, msgspec.Raw]) -> dict[str, bytes]:
    """The keys that ask for something. Raises InvalidRequest for one that we cannot honour."""
    given = {key: bytes(raw) for key, raw in outputs.items()}
    for key in given.keys() - _WITHOUT_MEANING - set(_KINDS):
        if given[key] not in _INERT:
            raise _unsupported(f"{_OUTPUTS}.{key[:64]}")
    return {kind: given[kind] for kind in _KINDS if given.get(kind, b"null") != b"null"}


def _of_schema(text: bytes, param: str) -> Grammar:
    load_schema(text, param)
    return Grammar(json_schema=text.decode(), param=param)


def load_schema(text: bytes, param: str) -> dict[str, Any]:
    """A JSON schema as it is written. Raises InvalidRequest: malformed, too large or too deep."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"a schema may have at most {MAX_SCHEMA_BYTES} bytes", param=param)
    schema = _decode(text, dict[str, Any], param)
    if _is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(f"a schema may be nested at most {MAX_SCHEMA_DEPTH} levels deep", param=param)
    return schema


def _of_regex(regex: str, param: str) -> Grammar:
    if not 1 <= len(regex.encode()) <= MAX_REGEX_BYTES:
        raise InvalidRequest(f"a regular expression has between 1 and {MAX_REGEX_BYTES} bytes", param=param)
    return Grammar(regex=regex, param=param)


def _of_choice(texts: list[str], param: str) -> Grammar:
    if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
        raise InvalidRequest(f"between 1 and {MAX_CHOICES} texts are needed, none of them empty", param=param)
    if sum(len(text.encode()) for text in texts) > MAX_CHOICES_BYTES:
        raise InvalidRequest(f"all texts together may have at most {MAX_CHOICES_BYTES} bytes", param=param)
    return Grammar(choice=Choices(texts=texts), param=param)


def _decode(raw: bytes, kind: type[_T], param: str) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(f"{param}: not valid JSON", param=param) from None


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and arrays lie more than ``limit`` levels inside one another."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_is_deeper(item, limit - 1) for item in inside)


def _unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported by this server", code="unsupported_parameter", param=param)
