"""Grammars over a real vocabulary: what may come next, when a reply is whole, and what cannot be kept to is refused."""

import json
import re

import pytest
import tokenizers
from tokenizers import decoders, models

from common.service.errors import InvalidRequest
from language_server.grammar import GrammarCompiler
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import Choices, Grammar, ToolCalls, ToolSchema
from tests.checkpoints import SPECIAL_TOKENS, make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer().backend_tokenizer)
EOS = TOKENIZER.token_id("<|im_end|>")
VOCAB = 512  # wider than the tokenizer's
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, {EOS})
POINT = {
    "type": "object",
    "properties": {"y": {"type": "integer"}, "x": {"enum": ["left", "right"]}},
    "required": ["y", "x"],
    "additionalProperties": False,
}
NESTED = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}


def schema(value, param="response_format.json_schema.schema"):
    return Grammar(json_schema=value if isinstance(value, str) else json.dumps(value), param=param)


def regex(text):
    return Grammar(regex=text, param="structured_outputs.regex")


def choice(*texts):
    return Grammar(choice=Choices(texts=texts), param="structured_outputs.choice")


def allowed(state):
    mask = int.from_bytes(state.mask(), "little")
    return {token_id for token_id in range(VOCAB + 64) if mask >> token_id & 1}


def follow(grammar, text, tokenizer=TOKENIZER, compiler=COMPILER):
    """The state behind ``text``, spelled with the longest tokens allowed; None where the grammar does not allow it."""
    state, rest = compiler.compile(grammar), text.encode()
    while rest:
        fitting = [i for i in allowed(state) - {EOS} if rest.startswith(tokenizer.token_bytes(i))]
        if not fitting:
            return None
        token_id = max(fitting, key=lambda i: len(tokenizer.token_bytes(i)))
        assert state.consume(token_id)
        rest = rest[len(tokenizer.token_bytes(token_id)) :]
    return state


def is_whole(grammar, text, **kwargs):
    state = follow(grammar, text, **kwargs)
    return state is not None and EOS in allowed(state)


def calls(*names, **allowed):
    """Of tools whose arguments are a ``POINT``."""
    tools = [ToolSchema(name=name, parameters=json.dumps(POINT)) for name in names]
    return Grammar(tool_calls=ToolCalls(tools=tools, **allowed), param="tools")


def call(name, arguments='{"y": 1, "x": "left"}'):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ODD_TEXT = 'a|b "\\ /\n\x00\x7f é 😀'

KEPT = [
    (Grammar(json_object=True), ["{}", '{"a": [1, {"b": null}]}', '{"é":"\\n"}'], ["[]", "1", " {}", "{} ", "{a:1}"]),
    (schema(POINT), ['{"y":1,"x":"left"}', '{\n  "y": -20,\n  "x": "right"\n}'], ['{"x":"left","y":1}', '{"y":1}']),
    (schema({"const": "<|im_end|>//"}), ['"<|im_end|>//"'], ['"<|im_end|>'],),
    (schema({"type": "integer", "minimum": 3, "maximum": 11}), ["3", "11"], ["2", "12", ""]),
    (schema(NESTED), ["[]", "[[],[[]]]"], ["[1]", "[[]"]),
    (schema({"type": "number", "multipleOf": 0.05, "minimum": 0}), ["0.15", "20"], ["0.16", "-1"]),
    (schema({"type": "integer", "multipleOf": 50000}), ["150000"], ["120000"]),
    (regex(r"[a-c]+/\d{2}"), ["abc/12"], ["abc/1", "d/12", "abc/123"]),
    (regex("^(yes|no)$"), ["yes", "no"], ["y", "yesno"]),
    (regex("a*"), ["", "aaa"], ["b"]),
    (regex("x\n\\\\"), ["x\n\\"], ["x\n"]),
    (regex('a/ | "b'), ["a/ ", ' "b'], ["b"]),
    (regex(r"[^a]é.😀"), ["béx😀"], ["aéx😀", "bé\n😀"]),
    (choice("red", "redder", ODD_TEXT), ["red", "redder", ODD_TEXT], ["re", "redd", "a"]),
    (choice(".*", "(?:"), [".*", "(?:"], ["", "x"]),
    (calls("f", "a.b"), [call("f"), call("a.b")], ["", "x", call("g"), call("f", "{}"), f"{call('f')}\n{call('f')}"]),
    (calls("f", allows_many=True), [call("f"), f"{call('f')}\n{call('f')}"], ["", f"x{call('f')}", f"{call('f')} x"]),
    (calls("f", allows_text=True), ["", "x <tool", f"x\n{call('f')}"], ["<tool_call>", call("g"), call("f") * 2]),
    (calls("f", allows_text=True, allows_many=True), ["", "x", f"x{call('f')} y\n{call('f')}z", "</tool_call>"],
     ["a <tool_call>", call("g"), call("f", "{}"), call("f", '{"y":1,"x":"up"}'), call("f") + "<tool_call>"]),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "right", "wrong"), KEPT, ids=[str(grammar)[:30] for grammar, _, _ in KEPT])
def test_whole_replies(grammar, right, wrong):
    """The end of turn is allowed behind a whole reply, and nowhere else."""
    assert [text for text in right if not is_whole(grammar, text)] == []
    assert [text for text in wrong if is_whole(grammar, text)] == []


def test_a_reply_to_which_nothing_can_be_added_is_finished():
    for grammar, text, is_finished in [
        (schema(POINT), '{"y":1,"x":"left"}', True),
        (schema(POINT), '{"y":1,"x":"left"', False),
        (choice("red", "redder"), "red", False),
        (choice("red", "redder"), "redder", True),
        (schema({"type": "integer"}), "12", False),
    ]:
        state = follow(grammar, text)
        assert state is not None
        assert state.is_finished == is_finished, text


def test_special_and_padding_tokens_are_never_text():
    state = COMPILER.compile(regex("(?s:.*)"))
    ids = allowed(state)
    assert {i for i in ids if i >= TOKENIZER.vocab_size} == set()
    assert {i for i in ids if TOKENIZER.is_special(i)} == {EOS}
    assert len(ids) > 100
    spelled = follow(choice("<|im_end|>"), "<|im_end|>")
    assert spelled is not None and spelled.is_finished


def test_every_id_that_ends_a_turn_is_allowed_at_the_end():
    other = TOKENIZER.token_id("<|endoftext|>")
    compiler = GrammarCompiler(TOKENIZER, VOCAB, {EOS, other})
    for end in (EOS, other):
        state = compiler.compile(regex("a?"))
        assert {EOS, other} <= allowed(state)
        assert state.consume(end)
        assert state.is_finished


def test_whitespace_inside_json_is_bounded():
    assert is_whole(schema({"type": "array"}), f"[{' ' * 24}]")
    assert follow(schema({"type": "array"}), f"[{' ' * 25}") is None


def test_a_schema_cannot_loosen_its_own_rules():
    free = {"whitespace_flexible": True, "whitespace_pattern": None, "lenient": True, "item_separator": "x"}
    loose = schema({"type": "array", "items": {"type": "integer"}, "x-guidance": free})
    assert is_whole(loose, "[1,2]")
    assert not is_whole(loose, "[1x2]")
    assert follow(loose, f"[{' ' * 25}") is None
    with pytest.raises(InvalidRequest):
        COMPILER.compile(schema({"type": "string", "not": {"const": "a"}, "x-guidance": free}))


def test_a_token_that_is_not_allowed_is_not_consumed():
    state = COMPILER.compile(choice("red"))
    blue = TOKENIZER.encode("b")[0]
    assert blue not in allowed(state)
    assert not state.consume(blue)
    assert not state.is_finished


def test_copies_go_their_own_ways():
    first = COMPILER.compile(choice("ab", "cd"))
    second = first.copy()
    assert first.consume(TOKENIZER.encode("a")[0])
    assert TOKENIZER.encode("b")[0] in allowed(first)
    assert TOKENIZER.encode("c")[0] in allowed(second)
    assert TOKENIZER.encode("b")[0] not in allowed(second)


def test_replay_leads_to_the_same_place():
    text = '{"y":1,"x":"le'
    state = COMPILER.compile(schema(POINT))
    state.replay(TOKENIZER.encode(text))
    expected = follow(schema(POINT), text)
    assert expected is not None
    assert allowed(state) == allowed(expected)
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(schema(POINT)).replay(TOKENIZER.encode("hello"))
    assert caught.value.param == "continuations"


def test_a_reply_header_comes_first():
    opener, closer = TOKENIZER.token_id("<quad>"), TOKENIZER.token_id("</quad>")
    state = GrammarCompiler(TOKENIZER, VOCAB, {EOS}, (opener, "f/", closer)).compile(choice("yes"))
    assert allowed(state) == {opener}
    state.replay([opener, *TOKENIZER.encode("f/"), closer, *TOKENIZER.encode("yes")])
    assert state.is_finished


def test_a_vocabulary_of_words_with_their_spaces():
    """SentencePiece: the byte of a token is not its text, and nothing is put before the reply."""
    pieces = ["<unk>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁yes", "yes", "▁", "no"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    compiler = GrammarCompiler(tokenizer, len(pieces), {1})
    state = compiler.compile(regex("yes( no)?"))
    assert {pieces[i] for i in allowed(state)} == {"yes", "<0x79>"}
    state.replay([pieces.index("yes"), pieces.index("▁"), pieces.index("no")])
    assert state.is_finished


def test_tags_may_be_tokens_of_their_own():
    """As in Qwen's vocabularies, where they are not marked special."""
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    backend.add_tokens([tokenizers.AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")])
    tokenizer = Tokenizer(backend)
    opening, closing = (tokenizer.token_id(tag) for tag in ("<tool_call>", "</tool_call>"))
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    for grammar in (calls("f"), calls("f", allows_text=True)):
        state = compiler.compile(grammar)
        assert opening in allowed(state)
        state.replay(tokenizer.encode(call("f").removesuffix("</tool_call>")))
        assert closing in allowed(state)
        state.replay([closing])
        assert state.is_finished


REFUSED = [
    (Grammar(tool_calls=ToolCalls(), param="tools"), "invalid_value"),
    (Grammar(tool_calls=ToolCalls(tools=[ToolSchema(name="f", parameters="{")]), param="tools"), "invalid_value"),
    (
        Grammar(tool_calls=ToolCalls(tools=[ToolSchema(name="f", parameters='{"not": {}}')]), param="tools"),
        "unsupported_parameter",
    ),
    (regex("("), "invalid_value"),
    (regex("["), "invalid_value"),
    (regex("x\\"), "invalid_value"),
    (regex("\\"), "invalid_value"),
    (regex(""), "invalid_value"),
    (regex("(" * 500 + ")" * 500), "invalid_value"),
    (regex("a[^\\x00-\\U0010ffff]"), "invalid_value"),  # nothing matches
    (regex("(?=a)a"), "unsupported_parameter"),
    (regex(r"(a)\1"), "unsupported_parameter"),
    (regex(r"\bword\b"), "unsupported_parameter"),
    (choice(), "invalid_value"),
    (Grammar(param="structured_outputs"), "invalid_value"),
    (schema("{"), "invalid_value"),
    (schema("[" * 10_000), "invalid_value"),
    (schema("[]"), "invalid_value"),
    (schema('{"minimum": NaN, "type": "number"}'), "invalid_value"),
    (schema({"type": "word"}), "invalid_value"),
    (schema({"type": "integer", "multipleOf": -999983}), "invalid_value"),
    (schema({"type": "integer", "multipleOf": 10**400 + 1}), "invalid_value"),
    (schema({"type": "integer", "multipleOf": 0}), "invalid_value"),
    (schema({"type": "integer", "minimum": 2, "maximum": 1}), "invalid_value"),
    (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "invalid_value"),
    (schema({"$ref": "#"}), "invalid_value"),
    (schema({"$ref": "https://example.com/schema.json"}), "invalid_value"),
    (schema({"$ref": "file:///etc/passwd"}), "invalid_value"),
    (schema({"type": "string", "pattern": "("}), "invalid_value"),
    (schema({"type": "integer", "multipleOf": 123456789}), "invalid_value"),  # gigabytes of states
    (schema({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 99.67}]}), "invalid_value"),
    (schema({"not": {"type": "string"}}), "unsupported_parameter"),
    (schema({"type": "array", "uniqueItems": True}), "unsupported_parameter"),
    (schema({"type": "string", "format": "no-such-format"}), "unsupported_parameter"),
    (schema({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "unsupported_parameter"),
    (schema({"type": "string", "pattern": "(?!a)"}), "unsupported_parameter"),
    (schema({"properties": {"secret" * 40: {"if": {}}}}), "unsupported_parameter"),
]


@pytest.mark.parametrize(("grammar", "code"), REFUSED, ids=[str(grammar)[:40] for grammar, _ in REFUSED])
def test_what_cannot_be_kept_to_is_refused_by_name(grammar, code):
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(grammar)
    assert (caught.value.code, caught.value.param) == (code, grammar.param)
    assert len(caught.value.message) < 120
    assert "\n" not in caught.value.message
    assert "secretsecret" not in caught.value.message


HUGE = [
    regex("((((a{10}){10}){10}){10}){10}"),
    regex("(a{1000}){1000}"),
    regex(r"\w{1,500}\p{Greek}{400}"),
    regex(r"(\w+){0,1000}"),
    regex("(?i:((.*|(.*){0,6})){0,1000}).*"),
    schema({"const": "x" * 60_000}),
    schema({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(1500)}}),
    schema({"type": "string", "pattern": "(.*a.{200}){5}"}),
    schema({"type": "array", "minItems": 10**6, "items": {"type": "string", "maxLength": 10**9}}),
    choice(*(f"{index} é" * 5 for index in range(1024))),
]


@pytest.mark.parametrize("grammar", HUGE, ids=[str(grammar)[:40] for grammar in HUGE])
def test_a_grammar_that_is_too_much_fails_by_itself(grammar):
    """At compile time or later: it allows only its own tokens, or it is an error of the request, and nothing else."""
    try:
        state = COMPILER.compile(grammar)
        for _ in range(50):
            ids = allowed(state)
            assert ids
            if ids == {EOS}:
                break
            assert state.consume(max(ids - {EOS}))  # what the mask allows is right, or the grammar's own error
    except InvalidRequest as error:
        assert error.param == grammar.param
        assert re.search("too|exhausted|max", error.message), error.message


def test_structure_tokens_are_what_this_file_thinks():
    assert set(SPECIAL_TOKENS) >= {"<|im_end|>", "<|endoftext|>", "<quad>", "</quad>"}
