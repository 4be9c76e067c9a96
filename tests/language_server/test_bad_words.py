"""Words that are never completed: spelled as a real tokenizer spells them, at the beginning and behind a space."""

import pytest

from common.service.errors import InvalidRequest
from deploy.settings import model_directory
from language_server.bad_words import BadWords
from language_server.tokenizer import Tokenizer

NANO = Tokenizer.load(model_directory("nano"))


def spelled(text):
    return NANO.encode(text)


def test_the_last_token_is_forbidden_where_the_others_came():
    words = BadWords([[1, 2, 3], [1, 2, 4], [2, 5], [9]])
    assert words.forbidden([]) == [9]
    assert words.forbidden([1, 2]) == [3, 4, 5, 9]
    assert words.forbidden([2, 1]) == [9]
    assert words.forbidden([1, 2, 3]) == [9]
    assert words.needs_history and not BadWords([[9]]).needs_history
    assert not BadWords() and BadWords().forbidden([1]) == []


@pytest.mark.parametrize("word", ["red", " red", "square and", "1234", "é"])
def test_a_word_is_forbidden_at_the_beginning_and_behind_a_space(word):
    """As long as it is spelled as the tokenizer would; a space may be a token of its own."""
    bad = BadWords.of([word], NANO.encode)
    plain, spaced = spelled(word.strip()), spelled(f" {word.strip()}")
    assert plain[-1] in bad.forbidden([7, *plain[:-1]])
    assert spaced[-1] in bad.forbidden([7, *spaced[:-1]])
    assert spelled("blue")[0] not in bad.forbidden([])


def test_a_word_of_one_token_is_forbidden_always():
    [red] = spelled(" red")
    bad = BadWords.of(["red", "blue"], NANO.encode)
    assert red in bad.forbidden([]) and red in bad.forbidden(spelled(" a big"))


def test_blanks_are_no_word():
    with pytest.raises(InvalidRequest) as caught:
        BadWords.of(["a", " "], NANO.encode)
    assert caught.value.param == "bad_words[1]"
    with pytest.raises(InvalidRequest):
        BadWords.of(["a"], lambda text: [])


def test_a_special_token_in_a_word_is_plain_text():
    bad = BadWords.of(["<|im_end|>"], NANO.encode)
    assert NANO.token_id("<|im_end|>") not in bad.forbidden([])
