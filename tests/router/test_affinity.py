"""Requests that share work share a key."""

from protos.language_pb2 import (
    ChatMessage,
    ContentPart,
    GenerateRequest,
    ImageBlock,
    ImagePiece,
    ImageRef,
    RawPrompt,
    TokenIds,
)
from router.affinity import content_key, prefix_key
from tests.router.conftest import png, running_system, user


def request(
    *messages: tuple[str, str | list[str | int]], scope: str = "tenant", images: bytes = b"ab"
) -> GenerateRequest:
    """Messages are role and text, or role and a list of texts and indices of images."""
    generate = GenerateRequest(request_id=bytes(16), cache_scope=scope)
    generate.images.extend(ImageRef(mm_hash=bytes([name]) * 32, max_num_tokens=256) for name in images)
    for role, parts in messages:
        wire = [
            ContentPart(text=part) if isinstance(part, str) else ContentPart(image_index=part)
            for part in (parts if isinstance(parts, list) else [parts])
        ]
        generate.messages.append(ChatMessage(role=role, parts=wire))
    return generate


def test_later_turns_have_the_key_of_the_first():
    first = request(("system", "be brief"), ("user", "hello"))
    second = request(("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", ["and this?", 0]))
    assert prefix_key(first) == prefix_key(second)
    assert len(prefix_key(first)) == 32


def test_other_texts_and_tenants_have_other_keys():
    keys = {
        prefix_key(request(*messages, scope=scope))
        for messages in (
            [("system", "a"), ("user", "b")],
            [("system", "ab"), ("user", "")],
            [("user", "a"), ("assistant", "b")],
            [("user", [0])],
        )
        for scope in ("one", "two")
    }
    assert len(keys) == 8


def test_questions_about_one_image_share_a_key():
    assert prefix_key(request(("user", [0, "what?"]))) == prefix_key(request(("system", "x"), ("user", ["where?", 0])))
    assert prefix_key(request(("user", [0]), images=b"a")) == prefix_key(request(("user", [1]), images=b"ba"))
    assert prefix_key(request(("user", [0]))) != prefix_key(request(("user", [1])))


def test_a_block_counts_as_its_first_image():
    block = request(("user", ["x"]))
    block.messages[0].parts.append(ContentPart(block=ImageBlock(pieces=[ImagePiece(image_index=1)])))
    assert prefix_key(block) == prefix_key(request(("user", [1])))


def test_content_is_all_that_a_server_works_on_and_nothing_that_changes():
    first, second = request(("user", "x")), request(("user", "x"))
    second.request_id = b"1" * 16
    second.sampling.seed = 4
    second.continuations.add(choice=0, output_token_ids=[1, 2])
    assert content_key(first) == content_key(second)
    second.sampling.max_tokens = 5
    assert content_key(first) != content_key(second)
    assert second.continuations


async def test_a_conversation_stays_on_its_server():
    async with running_system(num_language=4) as system:
        turns = [user(png(), "what?")]
        for _ in range(4):
            assert (await system.chat(messages=turns)).status_code == 200
            turns += [{"role": "assistant", "content": "this"}, user("and then?")]
        assert sorted(len(language.requests) for language in system.languages) == [0, 0, 0, 4]


async def test_conversations_are_spread():
    async with running_system(num_language=2) as system:
        for index in range(12):
            assert (await system.chat(messages=[user(f"question {index}")])).status_code == 200
        assert all(language.requests for language in system.languages)


def test_raw_prompts_share_the_key_of_their_beginning():
    beginning = "a" * 1024
    raws = [
        RawPrompt(text=f"{beginning}b"),
        RawPrompt(text=f"{beginning}c"),
        RawPrompt(text="b"),
        RawPrompt(token_ids=TokenIds(ids=[1, 2])),
        RawPrompt(token_ids=TokenIds(ids=[1, 3])),
    ]
    keys = [prefix_key(GenerateRequest(raw=raw, cache_scope="tenant")) for raw in raws]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    assert prefix_key(GenerateRequest(raw=raws[0])) not in keys
