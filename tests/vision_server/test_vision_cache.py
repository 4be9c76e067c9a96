"""Least recently used first, never above its size, and nothing of one key under another."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vision_server.cache import GroupCache
from vision_server.device_jobs import EncodedGroup, Times

ROW_BYTES = 4


def group(num_rows: int, value: float = 0.0) -> EncodedGroup:
    return EncodedGroup(0, 1, (num_rows,), torch.full((num_rows, 1), value, dtype=torch.float32), Times(0, 0, 0))


def test_what_was_put_is_found_until_it_makes_room():
    cache = GroupCache(10 * ROW_BYTES)
    for name in ("a", "b"):
        cache.put(name, [group(4)])
    assert cache.get("a") is not None
    cache.put("c", [group(4)])  # b was used longest ago
    assert cache.get("b") is None
    assert cache.get("a") is not None and cache.get("c") is not None


def test_an_image_larger_than_the_cache_is_not_kept_and_drives_nothing_out():
    cache = GroupCache(10 * ROW_BYTES)
    cache.put("a", [group(4)])
    cache.put("b", [group(6), group(5)])
    assert cache.get("b") is None and cache.get("a") is not None


def test_a_cache_of_nothing_keeps_nothing():
    cache = GroupCache(0)
    cache.put("a", [group(1)])
    assert cache.get("a") is None and cache.num_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.booleans()), max_size=40))
def test_size_and_contents_always_agree(steps):
    cache = GroupCache(20 * ROW_BYTES)
    last: dict[str, float] = {}
    for number, (key, num_rows, is_put) in enumerate(steps):
        if is_put:
            cache.put(key, [group(num_rows, float(number))])
            last[key] = number
        elif (found := cache.get(key)) is not None:
            assert isinstance(found[0], EncodedGroup)
            assert found[0].features[0, 0] == last[key]
    kept = [entry for key in "abcdef" if (entry := cache.get(key)) is not None]
    assert cache.num_bytes == sum(entry.num_bytes for groups in kept for entry in groups) <= 20 * ROW_BYTES
    assert len(cache) == len(kept)
