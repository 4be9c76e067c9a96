"""Placement rules, without clocks or sockets."""

import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.policy import elect_fingerprint, pick_language, pick_vision

NAMES = ("a", "b", "c", "d")
loads = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1000))


def key(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


def test_no_servers():
    assert pick_language(key(0), {}) is None
    assert pick_vision(key(0), {}) is None
    assert elect_fingerprint(None, []) is None


def test_language_goes_to_the_least_loaded():
    assert pick_language(key(0), {"a": 3, "b": 1, "c": 2}) == "b"


def test_equally_loaded_language_servers_share():
    counts = Counter(pick_language(key(index), dict.fromkeys(NAMES, 0)) for index in range(400))
    assert set(counts) == set(NAMES)
    assert min(counts.values()) > 50


def test_equal_images_meet():
    idle = dict.fromkeys(NAMES, 0)
    assert all(pick_vision(key(i), idle) == pick_vision(key(i), idle) for i in range(50))
    counts = Counter(pick_vision(key(index), idle) for index in range(400))
    assert min(counts.values()) > 50


def test_losing_a_server_moves_only_its_images():
    idle = dict.fromkeys(NAMES, 0)
    before = {index: pick_vision(key(index), idle) for index in range(200)}
    del idle["b"]
    after = {index: pick_vision(key(index), idle) for index in range(200)}
    assert all(after[index] == server for index, server in before.items() if server != "b")


def test_a_new_server_moves_images_to_itself_only():
    """Nor does it matter in which order a router came to know its servers."""
    idle = dict.fromkeys(NAMES, 0)
    before = {index: pick_vision(key(index), idle) for index in range(200)}
    with_new = dict.fromkeys(("e", *reversed(NAMES)), 0)
    after = {index: pick_vision(key(index), with_new) for index in range(200)}
    moved = {index for index in before if after[index] != before[index]}
    assert {after[index] for index in moved} == {"e"}
    assert 20 < len(moved) < 80  # a fifth


def test_an_overloaded_server_loses_its_images():
    favourite = pick_vision(key(1), {"a": 0, "b": 0}) or ""
    other = "b" if favourite == "a" else "a"
    busy = {favourite: 100, other: 10}
    assert pick_vision(key(1), busy) == other


@given(loads, st.binary(min_size=32, max_size=32))
def test_vision_always_finds_a_server_near_the_mean(known, image_hash):
    chosen = pick_vision(image_hash, known)
    if not known:
        assert chosen is None
    else:
        assert known[chosen] * len(known) * 4 <= sum(known.values()) * 5


def test_fingerprint_sticks_while_anybody_has_it():
    assert elect_fingerprint(None, [b"a", b"b", b"b"]) == b"b"
    assert elect_fingerprint(None, [b"a", b"b"]) == b"a"
    assert elect_fingerprint(b"a", [b"b", b"b", b"a"]) == b"a"
    assert elect_fingerprint(b"a", [b"b"]) == b"b"
