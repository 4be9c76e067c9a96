"""All deltas joined are the full decoding; nothing half-done ever leaves."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_server.detokenizer import IncrementalDetokenizer
from language_server.tokenizer import Tokenizer
from tests.checkpoints import SPECIAL_TOKENS, make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer
TOKENIZER = Tokenizer(BACKEND)
TOKENS = st.lists(st.integers(0, TOKENIZER.vocab_size + 15), max_size=60)


def push_all(detokenizer, ids):
    """Deltas up to a stop string, what was flushed included."""
    deltas = []
    for token_id in ids:
        text, stopped = detokenizer.push(token_id)
        deltas.append(text)
        if stopped:
            return deltas, True
    return [*deltas, detokenizer.flush()], False


@given(TOKENS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_decode_as_a_whole(ids, skip_special_tokens):
    deltas, _ = push_all(IncrementalDetokenizer(TOKENIZER, skip_special_tokens), ids)
    assert "".join(deltas) == BACKEND.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", ["你好，世界", "naïve 👩‍👩‍👧‍👦 café", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u202eright to left\u202c"])
def test_characters_are_never_split(text):
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)  # some character takes several tokens
    deltas, _ = push_all(IncrementalDetokenizer(TOKENIZER), ids)
    assert "".join(deltas) == text
    assert "�" not in "".join(deltas)
    assert "" in deltas  # a token that completes no character adds nothing


def test_an_incomplete_character_at_the_end_is_replaced():
    ids = BACKEND.encode("好", add_special_tokens=False).ids[:-1]
    deltas, _ = push_all(IncrementalDetokenizer(TOKENIZER), ids)
    assert "".join(deltas) == "�"


@given(
    st.text(alphabet="ab你🙂", max_size=40), st.lists(st.text(alphabet="ab你🙂", min_size=1, max_size=4), max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(text, stop):
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    deltas, stopped = push_all(IncrementalDetokenizer(TOKENIZER, stop=stop), ids)
    assert stopped == any(word in text for word in stop)
    if not stopped:
        assert "".join(deltas) == text
        return
    sent = "".join(deltas)
    assert text.startswith(sent)
    assert not any(word in sent for word in stop)
    assert any(text.startswith(word, len(sent)) for word in stop)


def test_what_may_become_a_stop_string_is_held_back():
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop=["bc"])
    a, b, d = (BACKEND.encode(letter, add_special_tokens=False).ids[0] for letter in ("a", "b", "d"))
    assert [detokenizer.push(token)[0] for token in (a, b, d)] == ["a", "", "bd"]


def test_before_min_tokens_a_stop_string_is_text():
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop=["a"])
    (a,) = BACKEND.encode("a", add_special_tokens=False).ids
    assert detokenizer.push(a, may_stop=False) == ("a", False)
    assert detokenizer.push(a) == ("", True)


def test_a_channel_header_is_no_text():
    start, channel, message, end = (
        TOKENIZER.token_id(text) for text in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    )
    final, hello = BACKEND.encode("final").ids, BACKEND.encode("hello").ids
    ids = [channel, *final, message, *hello, end, start, *final, channel, *final, message, *hello]
    hidden = (frozenset({start, channel}), message)
    assert "".join(push_all(IncrementalDetokenizer(TOKENIZER, hidden=hidden), ids)[0]) == "hellohello"
    shown = "".join(push_all(IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False, hidden=hidden), ids)[0])
    assert shown == BACKEND.decode(ids, skip_special_tokens=False)


def test_token_bytes_join_to_the_text():
    text = "".join(random.Random(0).choices("abc é你🙂\n", k=200))
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids).decode() == text
    assert TOKENIZER.token_bytes(10**6) == b""
    assert all(TOKENIZER.is_special(TOKENIZER.token_id(text)) for text in SPECIAL_TOKENS)
