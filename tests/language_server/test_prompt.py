"""Prompts have the ids of the whole rendered string; what users type places nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model.config import SYSTEM_MESSAGES
from common.service.errors import CheckpointError, InvalidRequest
from language_server.prompt import THINKING_MESSAGE, PromptBuilder
from language_server.tokenizer import GROUNDING_TOKENS, STRUCTURE_TOKENS, Tokenizer
from protos.language_pb2 import ChatMessage, ToolCall
from tests.checkpoints import SPECIAL_TOKENS, make_tokenizer
from tests.language_server.messages import message, video

FAST = make_tokenizer()
TOKENIZER = Tokenizer(FAST.backend_tokenizer)
PLAIN_TEXT = st.text(max_size=40).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


def builder(template="internvl2_5", system_message=None):
    return PromptBuilder(TOKENIZER, template, system_message)


def ids_of(prompt, *num_image_tokens):
    """Of a prompt in which each image has one tile of so many tokens."""
    return lay_out(prompt, [[count] for count in num_image_tokens])[0]


def lay_out(prompt, tile_tokens, names=None):
    """With the tiles of each image named alike."""
    names = names or [bytes(32)] * len(tile_tokens)
    return prompt.lay_out(tile_tokens, [[name] * len(sizes) for name, sizes in zip(names, tile_tokens, strict=True)])


def expand(rendered, *num_image_tokens):
    """What InternVLProcessor makes of one placeholder per image."""
    for count in num_image_tokens:
        rendered = rendered.replace("<IMG_CONTEXT>", f"<img>{'@' * count}</img>", 1)
    return FAST(rendered.replace("@", "<IMG_CONTEXT>"))["input_ids"]


def hf_messages(messages):
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if part.WhichOneof("part") == "text" else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in messages
    ]


CONVERSATIONS = {
    "text": ([message("user", "how many shapes are there?")], []),
    "system": ([message("system", "be brief"), message("user", "the number is 1234")], []),
    "image": ([message("user", 0, "describe the image")], [256]),
    "image last": ([message("user", "describe the image", 0)], [4]),
    "two images": ([message("user", 0, 1, "same number?")], [256, 512]),
    "three turns": (
        [
            message("user", 0, "what is it"),
            message("assistant", "a red square"),
            message("user", "first: ", 1, "second"),
            message("assistant", "two"),
            message("user", "sure？ 你好"),
        ],
        [3, 2],
    ),
    "split text": ([message("user", "des", "cribe the ", "image")], []),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_the_chat_template_of_transformers(name):
    messages, counts = CONVERSATIONS[name]
    rendered = FAST.apply_chat_template(hf_messages(messages), tokenize=False, add_generation_prompt=True)
    assert ids_of(builder().build(messages, [1] * len(counts)), *counts) == expand(rendered, *counts)


@given(st.lists(PLAIN_TEXT, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_text_is_tokenised_as_one_string_between_special_tokens(texts):
    messages = [message("user", *texts), message("assistant", texts[0]), message("user", texts[-1])]
    rendered = FAST.apply_chat_template(hf_messages(messages), tokenize=False, add_generation_prompt=True)
    assert ids_of(builder().build(messages, [])) == FAST(rendered)["input_ids"]


def test_spans_name_the_placeholders():
    prompt = builder().build([message("user", 1, 0, "x")], [1, 1])
    ids, spans = lay_out(prompt, [[2], [3]], [b"a" * 32, b"b" * 32])
    context = TOKENIZER.token_id("<IMG_CONTEXT>")
    assert [(span.image_index, span.num_tokens, span.mm_hash[:1]) for span in spans] == [(1, 3, b"b"), (0, 2, b"a")]
    for span in spans:
        assert ids[span.start - 1] == TOKENIZER.token_id("<img>")
        assert ids[span.start : span.end] == [context] * span.num_tokens
        assert ids[span.end] == TOKENIZER.token_id("</img>")
    assert prompt.num_text_tokens + 5 == len(ids)


def rows_of(spans):
    return [(span.image_index, span.first_row, span.num_tokens) for span in spans]


def test_a_block_of_the_whole_image_is_the_image():
    parts = "a", 0, "b"
    plain = builder().build([message("user", *parts)], [3])
    for whole in ([(0, 0, 0)], [(0, 0, 3)], [(0, 0, 1), (0, 1, 2)], [(0, 0, 2), (0, 2, 0)]):
        prompt = builder().build([message("user", "a", whole, "b")], [3])
        ids, spans = lay_out(prompt, [[4, 1, 4]])
        assert ids == lay_out(plain, [[4, 1, 4]])[0]
        assert [row for _, first, number in rows_of(spans) for row in range(first, first + number)] == [*range(9)]


def test_frames_of_a_video_have_a_block_each():
    prompt = builder().build([message("user", *video(0, 3), "what happens?")], [3])
    rendered = "".join(f"Frame-{frame}: <IMG_CONTEXT>\n" for frame in (1, 2, 3))
    expected = f"<|im_start|>user\n{rendered}what happens?<|im_end|>\n<|im_start|>assistant\n"
    ids, spans = lay_out(prompt, [[4, 1, 4]], [b"v" * 32])
    assert ids == expand(expected, 4, 1, 4)
    assert rows_of(spans) == [(0, 0, 4), (0, 4, 1), (0, 5, 4)]
    assert {span.mm_hash for span in spans} == {b"v" * 32}
    context = TOKENIZER.token_id("<IMG_CONTEXT>")
    assert [ids[span.start - 1 : span.end + 1] for span in spans] == [
        [TOKENIZER.token_id("<img>"), *[context] * span.num_tokens, TOKENIZER.token_id("</img>")] for span in spans
    ]


def test_combined_images_are_one_block():
    prompt = builder().build([message("user", [(0, 0, 0), (1, 0, 0)], "x", inline_images=True)], [2, 1])
    ids, spans = lay_out(prompt, [[2, 3], [4]])
    assert ids == expand("<|im_start|>user\n<IMG_CONTEXT>x<|im_end|>\n<|im_start|>assistant\n", 9)
    assert rows_of(spans) == [(0, 0, 5), (1, 0, 4)]
    assert spans.first_missing(0, lambda image: [5, 1][image]) == ids.index(TOKENIZER.token_id("<img>")) + 1 + 6


def test_what_stands_before_an_image():
    messages = [message("user", "one", 0, "two", [(1, 0, 1)], "three", [(2, 0, 0), (1, 1, 1)])]
    prompt = builder().build(messages, [1, 2, 1])
    whole, _ = lay_out(prompt, [[2], [3, 4], [5]])
    for awaited, num_images in (({0, 1, 2}, 0), ({1}, 1), ({2}, 2), ({1, 2}, 1), (set(), 4)):
        known = [0 if image in awaited else None for image in range(3)]
        ids, spans = lay_out(prompt.until(known), [[2], [3, 4], [5]])
        assert (ids, len(spans)) == (whole[: len(ids)], num_images)
        assert not awaited.intersection(span.image_index for span in spans)


def test_what_stands_before_a_tile():
    """Of frames that have come in pieces, and of an image in one."""
    prompt = builder().build([message("user", "one", 0, *video(1, 3), "what?")], [3, 3])
    sizes = [[2, 3, 4], [5, 1, 6]]
    whole, _ = lay_out(prompt, sizes)
    for known, rows in (
        ([0, None], []),
        ([2, None], [(0, 0, 5)]),
        ([None, 0], [(0, 0, 9)]),
        ([None, 2], [(0, 0, 9), (1, 0, 5), (1, 5, 1)]),
        ([None, None], [(0, 0, 9), (1, 0, 5), (1, 5, 1), (1, 6, 6)]),
    ):
        of_known = [own if number is None else own[:number] for number, own in zip(known, sizes, strict=True)]
        ids, spans = lay_out(prompt.until(known), of_known)
        assert (ids, rows_of(spans)) == (whole[: len(ids)], rows)


def test_tiles_of_different_names_have_spans_of_their_own():
    prompt = builder().build([message("user", 0, "what?")], [4])
    ids, spans = prompt.lay_out([[4, 1, 1, 4]], [[b"a", b"b", b"b", b"c"]])
    assert [(span.first_row, span.num_tokens, span.mm_hash) for span in spans] == [
        (0, 4, b"a"),
        (4, 2, b"b"),
        (6, 4, b"c"),
    ]
    assert [span.start for span in spans][1:] == [span.end for span in spans][:-1]
    assert ids == lay_out(prompt, [[4, 1, 1, 4]])[0]


def test_markers_add_no_newline():
    messages = [message("user", "Image-1: ", 0, " and ", 1, inline_images=True)]
    expected = "<|im_start|>user\nImage-1: <IMG_CONTEXT> and <IMG_CONTEXT><|im_end|>\n<|im_start|>assistant\n"
    assert ids_of(builder().build(messages, [1, 1]), 1, 2) == expand(expected, 1, 2)


@pytest.mark.parametrize("token", sorted(STRUCTURE_TOKENS | {"<|start|>", "<|return|>"}))
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_typed_structure_tokens_are_text(token, role):
    ids = ids_of(builder().build([message(role, f"a {token} b{token}"), message("user", token)], []))
    quiet = ids_of(builder().build([message(role, "a"), message("user", "b")], []))
    special = [token_id for token_id in ids if TOKENIZER.is_special(token_id)]
    assert special == [token_id for token_id in quiet if TOKENIZER.is_special(token_id)]
    assert f"a {token} b{token}" in FAST.decode(ids)


@pytest.mark.parametrize("token", sorted(GROUNDING_TOKENS))
def test_grounding_tokens_stay_special(token):
    ids = ids_of(builder().build([message("user", f"where is {token}it")], []))
    assert TOKENIZER.token_id(token) in ids


def test_default_system_message_yields_to_the_clients_own():
    default = SYSTEM_MESSAGES["internvl2_5"]
    own = builder(system_message=default).build([message("system", "mine"), message("user", "x")], [])
    assert own == builder().build([message("system", "mine"), message("user", "x")], [])
    without = builder(system_message=default).build([message("user", "x")], [])
    assert without == builder().build([message("system", default), message("user", "x")], [])


def test_a_conversation_that_thinks_opens_with_the_protocol():
    question = message("user", 0, "x")
    plain = builder().build([message("system", THINKING_MESSAGE), question], [1])
    assert THINKING_MESSAGE.startswith("You are") and THINKING_MESSAGE.endswith("section.")
    assert builder(system_message="the default").build([question], [1], thinking=True) == plain
    own = builder().build([message("system", "be ", "brief"), question], [1], thinking=True)
    assert own == builder().build([message("system", f"{THINKING_MESSAGE}\n\nbe brief"), question], [1])
    later = builder().build([question, message("system", "be brief")], [1], thinking=True)
    assert later == builder().build([message("system", THINKING_MESSAGE), question, message("system", "be brief")], [1])
    assert builder(system_message="the default").build([question], [1]) != plain


def test_a_format_that_does_not_think_in_its_text_is_not_asked_to():
    with pytest.raises(InvalidRequest, match="chat format") as caught:
        builder("internvl3_5_gpt_oss").build([message("user", "x")], [], thinking=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "chat_template_kwargs.enable_thinking")


def test_gpt_oss_format():
    messages = [message("user", "q1"), message("assistant", "a1"), message("user", 0, "q2")]
    ids = ids_of(builder("internvl3_5_gpt_oss", "s").build(messages, [1]), 2)
    expected = (
        "<|start|>system<|message|>s<|end|><|start|>user<|message|>q1<|end|>"
        "<|start|>assistant<|channel|>final<|message|>a1<|end|>"
        "<|start|>user<|message|><IMG_CONTEXT>\nq2<|end|><|start|>assistant"
    )
    assert ids == expand(expected, 2)
    openers, closer = builder("internvl3_5_gpt_oss", "s").hidden_header
    assert closer == TOKENIZER.token_id("<|message|>") and TOKENIZER.token_id("<|channel|>") in openers
    opener, channel, end = builder("internvl3_5_gpt_oss", "s").reply_header
    assert (opener in openers, channel, end) == (True, "final", closer)


@pytest.mark.parametrize(
    ("messages", "num_images", "param"),
    [
        ([], 0, "messages"),
        ([message("robot", "x")], 0, "messages[0].role"),
        ([message("user", "x")], 1, "messages"),
        ([message("user", 0, "x")], 0, "messages"),
        ([message("user", 0, 0)], 1, "messages"),
        ([message("user", 0, 2)], 2, "messages"),
        ([message("assistant", 0), message("user", "x")], 1, "messages[0]"),
        ([message("assistant", [(0, 0, 0)]), message("user", "x")], 1, "messages[0]"),
        ([message("user", 0), message("user", [], "x")], 1, "messages[1]"),
    ],
)
def test_what_does_not_fit_is_refused(messages, num_images, param):
    with pytest.raises(InvalidRequest) as caught:
        builder().build(messages, [1] * num_images)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("parts", "num_tiles"),
    [
        ([[(0, 0, 1)]], [2]),  # the second tile has no place
        ([[(0, 0, 3)]], [2]),
        ([[(0, 1, 0)], [(0, 0, 1)]], [2]),  # out of order
        ([[(0, 0, 1)], [(0, 0, 0)]], [2]),  # the first tile twice
        ([[(0, 0, 2)], [(0, 2, 0)]], [2]),  # nothing is left
        ([[(0, 0, 1)], 0], [2]),
        ([0, [(0, 0, 0)]], [2]),
        ([[(1, 0, 0)]], [2]),
        ([[(0, 0, 0), (2**32 - 1, 0, 0)]], [2]),
        ([[(0, 0, 2**32 - 1)]], [2]),
        ([[(0, 2**32 - 1, 2**32 - 1)]], [2]),
        ([[(0, 0, 0)]], [2, 1]),
        ([], [1]),
    ],
)
def test_every_tile_has_one_place_and_they_are_in_order(parts, num_tiles):
    with pytest.raises(InvalidRequest) as caught:
        builder().build([message("user", "x", *parts)], num_tiles)
    assert (caught.value.code, caught.value.param) == ("image_marker_mismatch", "messages")


def test_a_checkpoint_that_does_not_fit_its_template_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="chat format"):
        builder("chatml")
    with pytest.raises(CheckpointError, match="no token <nope>"):
        TOKENIZER.token_id("<nope>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_loads_what_transformers_saved(tmp_path):
    FAST.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("describe the image") == TOKENIZER.encode("describe the image")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        Tokenizer.load(tmp_path)


def test_loads_the_older_vocabulary_files_of_the_internvl_format(tmp_path):
    FAST.backend_tokenizer.model.save(str(tmp_path))
    added = FAST.backend_tokenizer.get_added_tokens_decoder()
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(token_id): {"content": token.content, "special": True} for token_id, token in added.items()
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("describe the image <ref>it</ref>") == TOKENIZER.encode("describe the image <ref>it</ref>")
    assert loaded.token_id("<IMG_CONTEXT>") == TOKENIZER.token_id("<IMG_CONTEXT>")


WEATHER = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
TIME = '{"type": "function", "function": {"name": "time"}}'


def calling(content, *calls):
    said = message("assistant", content) if content else ChatMessage(role="assistant")
    said.tool_calls.extend(ToolCall(name=name, arguments=arguments) for name, arguments in calls)
    return said


def test_tools_calls_and_results_read_as_qwen_was_trained():
    messages = [
        message("system", "be brief"),
        message("user", "?"),
        calling("", ("weather", '{"city": "Ulm"}'), ("time", "{}")),
        message("tool", "rain"),
        message("tool", "noon"),
        calling("so", ("time", "{}")),
        message("tool", "one"),
    ]
    rendered = f"""<|im_start|>system
be brief

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{WEATHER}
{TIME}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call><|im_end|>
<|im_start|>user
?<|im_end|>
<|im_start|>assistant
<tool_call>
{{"name": "weather", "arguments": {{"city": "Ulm"}}}}
</tool_call>
<tool_call>
{{"name": "time", "arguments": {{}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response>
<tool_response>
noon
</tool_response><|im_end|>
<|im_start|>assistant
so
<tool_call>
{{"name": "time", "arguments": {{}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
one
</tool_response><|im_end|>
<|im_start|>assistant
"""
    assert ids_of(builder().build(messages, [], tools=[WEATHER, TIME])) == FAST(rendered)["input_ids"]


@pytest.mark.parametrize("thinking", [False, True])
def test_tools_stand_behind_whatever_the_system_message_is(thinking):
    build = builder(system_message=SYSTEM_MESSAGES["internvl2_5"]).build
    text = TOKENIZER.decode(ids_of(build([message("user", "?")], [], thinking=thinking, tools=[TIME])))
    system = THINKING_MESSAGE if thinking else SYSTEM_MESSAGES["internvl2_5"]
    assert text.startswith(f"<|im_start|>system\n{system}\n\n# Tools\n")
    assert text.count("<|im_start|>system") == 1


def test_tools_results_and_arguments_place_nothing():
    typed = "".join(STRUCTURE_TOKENS)
    plain = builder().build([message("user", "?"), calling("", ("f", "{}")), message("tool", "")], [], tools=[TIME])
    messages = [message("user", "?"), calling("", ("f", f'{{"a": "{typed}"}}')), message("tool", typed)]
    marked = builder().build(messages, [], tools=[TIME.replace("time", typed)])

    def structure(prompt):
        return [token_id for token_id in ids_of(prompt) if TOKENIZER.is_special(token_id)]

    assert structure(marked) == structure(plain)


def test_a_chat_format_without_tools_refuses_them():
    build = builder("internvl3_5_gpt_oss").build
    with pytest.raises(InvalidRequest) as caught:
        build([message("user", "?")], [], tools=[TIME])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(InvalidRequest) as caught:
        build([message("user", "?"), calling("", ("f", "{}"))], [])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "messages[1].tool_calls")
