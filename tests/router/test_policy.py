"""Placement rules, without clocks or sockets."""

import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.policy import AFFINITY_SLACK, elect_fingerprint, pick_language, pick_vision

NAMES = ("a", "b", "c", "d")
loads = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1000))


def key(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


def test_no_servers():
    assert pick_language(key(0), key(1), {}) is None
    assert pick_vision(key(0), {}) is None
    assert elect_fingerprint(None, []) is None


def test_equal_prefixes_meet_and_different_ones_share():
    idle = dict.fromkeys(NAMES, 0)
    assert len({pick_language(key(0), key(index), idle) for index in range(50)}) == 1
    counts = Counter(pick_language(key(index), key(0), idle) for index in range(400))
    assert min(counts[name] for name in NAMES) > 50


def test_a_prefix_stays_where_it_is_known_while_others_have_little_less_to_do():
    favourite = pick_language(key(0), key(1), dict.fromkeys(NAMES, 0)) or ""
    few = dict.fromkeys(NAMES, 0) | {favourite: AFFINITY_SLACK}
    assert pick_language(key(0), key(1), few) == favourite
    many = dict.fromkeys(NAMES, 100) | {favourite: 150}
    assert pick_language(key(0), key(1), many) == favourite
    for loads in (few | {favourite: AFFINITY_SLACK + 1}, many | {favourite: 152}):
        assert pick_language(key(0), key(1), loads) != favourite


def test_a_prefix_that_everybody_has_is_spread():
    """A crowd with one prompt: no server gets much more than its share, however the crowd arrives."""
    loads = dict.fromkeys(NAMES, 0)
    for index in range(400):
        loads[pick_language(key(0), key(index), loads) or ""] += 1
    assert max(loads.values()) <= 1.5 * min(loads.values())


def test_losing_a_language_server_moves_only_its_prefixes():
    idle = dict.fromkeys(NAMES, 0)
    before = {index: pick_language(key(index), key(0), idle) for index in range(200)}
    del idle["b"]
    after = {index: pick_language(key(index), key(0), idle) for index in range(200)}
    assert all(after[index] == server for index, server in before.items() if server != "b")


@given(loads, st.binary(min_size=1, max_size=32), st.binary(min_size=16, max_size=16), st.integers(1, 8))
def test_language_is_a_function_of_what_is_known(known, prefix, request_id, cost):
    """Whatever the order in which a router met its servers; and the overloaded favourite is left for less."""
    chosen = pick_language(prefix, request_id, known, cost)
    assert chosen == pick_language(prefix, request_id, dict(reversed(known.items())), cost)
    assert (chosen is None) == (not known)
    if chosen is not None and len(known) <= 3:  # both others were looked at
        least = min(known.values())
        assert known[chosen] + cost <= max(1.5 * (least + cost), least + cost + AFFINITY_SLACK)


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


def test_the_tiles_of_the_image_itself_count():
    favourite = pick_vision(key(1), {"a": 0, "b": 0}) or ""
    other = "b" if favourite == "a" else "a"
    known = {favourite: 12, other: 10}
    assert pick_vision(key(1), known, num_tiles=1) == favourite
    assert pick_vision(key(1), known, num_tiles=13) == other
    assert pick_vision(key(1), {favourite: 0, other: 0}, num_tiles=13) == favourite


@given(loads, st.binary(min_size=32, max_size=32), st.integers(1, 41))
def test_vision_always_finds_a_server_near_the_mean(known, image_hash, num_tiles):
    chosen = pick_vision(image_hash, known, num_tiles)
    if not known:
        assert chosen is None
    else:
        is_near = (known[chosen] + num_tiles) * len(known) * 4 <= (sum(known.values()) + num_tiles) * 5
        assert is_near or known[chosen] == min(known.values())


def test_fingerprint_sticks_while_anybody_has_it():
    assert elect_fingerprint(None, [b"a", b"b", b"b"]) == b"b"
    assert elect_fingerprint(None, [b"a", b"b"]) == b"a"
    assert elect_fingerprint(b"a", [b"b", b"b", b"a"]) == b"a"
    assert elect_fingerprint(b"a", [b"b"]) == b"b"
