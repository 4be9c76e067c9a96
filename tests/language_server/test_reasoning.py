"""However a reply is cut into pieces, its division is that of the whole text; little of it is held back."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from language_server.choice import Choice
from language_server.detokenizer import IncrementalDetokenizer
from language_server.engine import StepOutput
from language_server.reasoning import CLOSE, MAX_LEADING_BLANKS, OPEN, ReasoningSplitter
from language_server.sequence import SamplingParams, Sequence
from language_server.tokenizer import Tokenizer
from tests.checkpoints import make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer
TOKENIZER = Tokenizer(BACKEND)
BITS = (OPEN, CLOSE, *"<>/think", "\n", " ", "a", "好")
TEXTS = st.lists(st.sampled_from(BITS), max_size=30).map("".join)
THINKING = st.tuples(st.sampled_from(("", "\n", "  ")), TEXTS).map(lambda pair: f"{pair[0]}{OPEN}{pair[1]}")


def divide(text):
    """The rule, for a whole text."""
    body = text.lstrip()
    if not body.startswith(OPEN) or len(text) - len(body) > MAX_LEADING_BLANKS:
        return "", text
    reasoning, is_closed, answer = body.removeprefix(OPEN).lstrip().partition(CLOSE)
    return (reasoning.removesuffix("\n"), answer.lstrip()) if is_closed else (reasoning, "")


def push_all(splitter, pieces):
    """What each piece brought, and what was flushed."""
    return [*map(splitter.push, pieces), splitter.flush()]


def joined(parts):
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


@given(TEXTS | THINKING, st.data())
@settings(max_examples=1000, deadline=None)
def test_any_pieces_are_divided_as_the_whole(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    splitter = ReasoningSplitter()
    parts = push_all(splitter, pieces)
    assert joined(parts) == divide(text)
    has_answer = [bool(answer) for _, answer in parts]
    has_reasoning = [bool(reasoning) for reasoning, _ in parts]
    assert not any(any(has_answer[:index]) for index, thinks in enumerate(has_reasoning) if thinks)


@given(TEXTS | THINKING)
@example(" " * 100 + OPEN)
@example(OPEN + "a\n\n" * 30)
@settings(max_examples=300, deadline=None)
def test_little_is_held_back(text):
    splitter = ReasoningSplitter()
    sent = ""
    for position, character in enumerate(text, 1):
        reasoning, answer = splitter.push(character)
        sent += reasoning + answer
        certain = "".join(divide(text[:position]))
        assert certain.startswith(sent)
        assert len(certain) - len(sent) <= MAX_LEADING_BLANKS + len(OPEN)


@given(TEXTS | THINKING)
@settings(deadline=None)
def test_switched_off_it_changes_nothing(text):
    assert push_all(ReasoningSplitter(is_active=False), text) == [*(("", character) for character in text), ("", "")]


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nIt is 4.\n</think>\n\nFour.", "It is 4.", "Four."),
        ("<think>It is 4.</think>Four.", "It is 4.", "Four."),
        ("\n<think>\n\n</think>\n\nFour.\n", "", "Four.\n"),
        ("<think>\nIt is\n\n4", "It is\n\n4", ""),
        ("<think>It is </thin", "It is </thin", ""),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("<think>a<think>b</think>c", "a<think>b", "c"),
        ("It is 4.\n</think>\n\nFour.", "", "It is 4.\n</think>\n\nFour."),
        ("Write <think> first.", "", "Write <think> first."),
        (" <box>", "", " <box>"),
        ("\n\n", "", "\n\n"),
        ("", "", ""),
    ],
)
def test_the_rule_by_examples(text, reasoning, answer):
    assert joined(push_all(ReasoningSplitter(), text)) == divide(text) == (reasoning, answer)


def test_thoughts_are_not_kept_waiting():
    splitter = ReasoningSplitter()
    assert [splitter.push(piece) for piece in ("<think>", "one", " two\n", "three", "</", "think>", "\n", "four")] == [
        ("", ""), ("one", ""), (" two", ""), ("\nthree", ""), ("", ""), ("", ""), ("", ""), ("", "four"),
    ]  # fmt: skip


# --- in a reply


def make_choice(output_token_ids=(), stop=(), **sampling):
    params = SamplingParams(max_tokens=1000, **sampling)
    sequence = Sequence(
        seq_id=0,
        request_id=bytes(16),
        prompt_token_ids=[1],
        sampling=params,
        output_token_ids=list(output_token_ids),
    )
    return Choice(0, sequence, IncrementalDetokenizer(TOKENIZER, True, stop), ReasoningSplitter(), TOKENIZER)


def take_all(choice, ids):
    """Reasoning and text of all tokens, and of the end; stops at a stop string."""
    parts = []
    for token_id in ids:
        token, reason = choice.take(StepOutput(0, token_id))
        parts.append((token.reasoning, token.text))
        if reason is not None:
            break
    return [*parts, choice.flush()]


SAID = "<think>\nthree red shapes, 好\n</think>\n\nthere are three"
IDS = BACKEND.encode(SAID, add_special_tokens=False).ids


def test_a_lost_servers_reply_is_divided_where_it_was():
    whole = take_all(make_choice(), IDS)
    assert joined(whole) == ("three red shapes, 好", "there are three")
    num_reasoning_tokens = next(n for n in range(len(IDS)) if CLOSE in BACKEND.decode(IDS[:n]))
    for cut in range(len(IDS) + 1):
        choice = make_choice(IDS[:cut])
        assert choice.replay(()) is None
        assert take_all(choice, IDS[cut:]) == whole[cut:]
        assert choice.num_reasoning_tokens == num_reasoning_tokens


def test_a_stop_string_counts_in_thoughts_and_answer_alike():
    """As in vLLM, where stop strings are looked for before the reply is divided."""
    assert joined(take_all(make_choice(stop=["shapes"]), IDS)) == ("three red ", "")
    assert joined(take_all(make_choice(stop=["are"]), IDS)) == ("three red shapes, 好", "there ")
    assert joined(take_all(make_choice(stop=["\n\n"]), IDS)) == ("three red shapes, 好", "")


def test_tokens_of_an_answer_without_thoughts_are_no_reasoning():
    choice = make_choice()
    said = "there are three <think>"
    assert joined(take_all(choice, BACKEND.encode(said, add_special_tokens=False).ids)) == ("", said)
    assert choice.num_reasoning_tokens == 0
