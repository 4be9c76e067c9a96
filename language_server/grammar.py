"""What a reply must be - JSON, a regular expression, a choice, calls of tools - as the tokens that may come next.

The library llguidance does the work; here it gets our tokens and its limits, and its errors become ours. Knows nothing
of logits, of requests or of threads.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from common.service.errors import InvalidRequest
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import Grammar, ToolCalls

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 1_000_000,  # compiling: some tens of milliseconds
    "max_grammar_size": 500_000,  # symbols
    "step_lexer_fuel": 50_000,  # one mask, while the batch waits: some tens of milliseconds at the worst
    "step_max_items": 50_000,
    "max_items_in_row": 20_000,  # ten times the library's default: an object of 1,500 optional properties needs 6,000
    "max_lexer_states": 20_000,  # up to 2 KiB each, and every sequence may have as many
    "verbose_errors": False,  # they would repeat the grammar
}
# Given with every schema, so that its own "x-guidance" cannot loosen anything. A model that may write any amount of
# whitespace sometimes writes nothing else; this much indents five levels.
_JSON_OPTIONS: Final[dict[str, Any]] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r"[ \t\n\r]{1,24}",
    "coerce_one_of": False,
    "lenient": False,
}
# By default the library lets text that must come be spelled only as the tokenizer would, and asks the tokenizer at
# every step: for a long constant that is slow, and its answer is wrong where the tokenizer puts a space first.
_HEAD: Final = '%llguidance {"no_forcing": true}'
_MAX_MULTIPLE: Final = 10_000
"""``multipleOf`` becomes an automaton with so many states, which no limit of the library counts: six digits are seconds
and nine are all the memory there is."""
_MAX_REASON_CHARS: Final = 80
_PLACE: Final = re.compile(r"^(?:at )?\d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>")
_UNSUPPORTED: Final = re.compile(r"unimplemented|not (?:yet )?supported|unknown format", re.IGNORECASE)


class GrammarState:
    """Where one sequence is in its grammar; a ``Constraint``. Used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", param: str) -> None:
        self._matcher = matcher
        self._param = param
        self._mask = b""  # the last one

    def copy(self) -> "GrammarState":
        """The same place, from which another sequence goes its own way."""
        return GrammarState(self._matcher.deep_copy(), self._param)

    @property
    def is_finished(self) -> bool:
        """The reply is whole and nothing may be added to it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> bytes:
        """The tokens that may come next, one bit each, lowest bit first; not cut to the size of the vocabulary.

        Ids that end a reply are among them when it is whole. Raises InvalidRequest when the grammar turns out too
        complex, or to have no reply that satisfies it.
        """
        self._mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error(), self._param)
        return self._mask

    def consume(self, token_id: int) -> bool:
        """Go on behind a token; False if the grammar does not allow it. Raises InvalidRequest like ``mask``."""
        if self._matcher.consume_token(token_id):
            return True
        if self._mask and self._mask[token_id // 8] >> token_id % 8 & 1:  # a limit was reached behind the mask
            raise InvalidRequest("the grammar cannot be used: it is too complex", param=self._param)
        return False

    def replay(self, token_ids: Sequence[int]) -> None:
        """Go on behind tokens that another server made. Raises InvalidRequest if the grammar does not allow them."""
        if not all(self.consume(token_id) for token_id in token_ids):
            raise InvalidRequest("the tokens do not follow the grammar", param="continuations")


class GrammarCompiler:
    """Compiles for one vocabulary. Making one takes about half a second for 150,000 tokens, and some 70 MB.

    Args:
        vocab_size: width of the model's logits; above the tokenizer's size no token is ever allowed.
        eos_token_ids: allowed when a reply is whole, and only then.
        reply_header: what the chat format puts before every reply, special tokens as ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        reply_header: Iterable[str | int] = (),
    ) -> None:
        from llguidance import LLParserLimits, LLTokenizer  # not needed to know what a grammar is

        vocabulary = _Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._tokens = LLTokenizer(vocabulary, eos_token=sorted(eos_token_ids) or None)  # type: ignore[arg-type]
        self._limits = LLParserLimits(**_LIMITS)
        header = [f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in reply_header]
        self._start = " ".join(["start:", *header, "reply"])

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state before the first token. May take some tenths of a second, in which the GIL is free.

        Raises:
            InvalidRequest: malformed, too complex, nothing satisfies it, or not a form that can be enforced.
        """
        from llguidance import LLMatcher

        text = "\n".join([_HEAD, self._start, f"reply: {_rule(grammar)}", ""])
        matcher = LLMatcher(self._tokens, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), grammar.param)
        state = GrammarState(matcher, grammar.param)
        state.mask()  # that nothing satisfies a grammar is noticed only here
        return state.copy()  # a replay asks for no masks, and must not be held against this one


class _Vocabulary:
    """Our tokenizer, with the attributes that llguidance looks for."""

    is_tokenizer_wrapper: Final = True
    bos_token_id: Final = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        ids = range(vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i) or i in eos_token_ids]
        self.eos_token_id = min(eos_token_ids, default=None)

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no grammar of ours forces text")


def _rule(grammar: Grammar) -> str:
    """The right side of the reply's rule, in llguidance's dialect of Lark."""
    from llguidance import regex_to_lark

    match grammar.WhichOneof("kind"):
        case "json_object":
            return _json_rule({"type": "object"})
        case "json_schema":
            schema = _load_schema(grammar.json_schema, grammar.param)
            _check_multiples(schema, grammar.param)
            return _json_rule(schema)
        case "regex" if grammar.regex:
            return f"/{regex_to_lark(_whole_regex(grammar), use_ascii='d')}/"
        case "choice" if grammar.choice.texts:
            return f"/{'|'.join(_escape(text) for text in grammar.choice.texts)}/"
        case "tool_calls" if grammar.tool_calls.tools:
            return _calls_rule(grammar.tool_calls, grammar.param)
        case _:
            raise InvalidRequest("the grammar is empty", param=grammar.param)


def _calls_rule(calls: ToolCalls, param: str) -> str:
    """Calls as Qwen's chat format writes them. In text, the opening tag is always the beginning of a call."""
    schemas = [_load_schema(tool.parameters, param) for tool in calls.tools]
    _check_multiples(schemas, param)
    if not calls.allows_text:
        rules = ['"<tool_call>" call' + (' ("\\n<tool_call>" call)*' if calls.allows_many else "")]
    elif calls.allows_many:
        rules = ["(opened call)* TEXT"]
    else:
        rules = ["opened call | TEXT"]
    if calls.allows_text:
        rules += ['opened[lazy]: TEXT "<tool_call>"', "TEXT: /(?s:.*)/"]
    heads = [json.dumps(f'\n{{"name": "{tool.name}", "arguments": ') for tool in calls.tools]
    options = " | ".join(f"{head} arguments_{index}" for index, head in enumerate(heads))
    rules.append(f'call: ({options}) "}}\\n</tool_call>"')
    rules += [f"arguments_{index}: {_json_rule(schema)}" for index, schema in enumerate(schemas)]
    return "\n".join(rules)


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS})}"


def _load_schema(text: str, param: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest("the schema is not valid JSON", param=param) from None
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema is not an object", param=param)
    return schema


def _check_multiples(schemas: Any, param: str) -> None:
    try:
        multiple = math.lcm(*_multiples(schemas))
    except (ValueError, OverflowError, RecursionError):
        raise InvalidRequest("the schema is not valid JSON", param=param) from None
    if multiple > _MAX_MULTIPLE:
        message = f"the grammar cannot be used: all multipleOf together come to more than {_MAX_MULTIPLE}"
        raise InvalidRequest(message, param=param)


def _multiples(value: Any) -> Iterator[int]:
    """The digits of every ``multipleOf`` inside a schema, without point and trailing zeros: they make the automaton."""
    if isinstance(value, dict):
        multiple = value.get("multipleOf", 0)
        if isinstance(multiple, int | float) and multiple and math.isfinite(multiple):
            yield int("".join(map(str, Decimal(repr(float(multiple))).normalize().as_tuple().digits)))
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _multiples(item)


def _whole_regex(grammar: Grammar) -> str:
    """``regex_to_lark`` would drop a backslash that escapes nothing."""
    regex = grammar.regex
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise InvalidRequest("the grammar cannot be used: it ends in a lone backslash", param=grammar.param)
    return regex


def _escape(text: str) -> str:
    """A regular expression that matches ``text`` alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _refusal(error: str, param: str) -> InvalidRequest:
    """llguidance's words, without the grammar they quote."""
    if "NoExtension" in error:
        return InvalidRequest("nothing satisfies the grammar", param=param)
    lines = error.splitlines() or [""]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    reason = " ".join(_PLACE.sub("", reason).split())[:_MAX_REASON_CHARS]
    code = "unsupported_parameter" if _UNSUPPORTED.search(reason) else None
    return InvalidRequest(f"the grammar cannot be used: {reason}", code=code, param=param)
