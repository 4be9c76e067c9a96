"""What arrives is checked, what is reserved comes back, and the engine sees only what is ready."""

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.service import metrics
from common.service.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded
from common.transport.base import receive_frame
from language_server.feature_image import FeatureLayout, ImageKey, tile_hashes
from language_server.features import FeatureStore
from language_server.reservation import LeaseState
from protos.frame import MAX_TILES, FrameHeader, FrameRejected, checksum, pack_header, parse_header, with_checksum
from protos.seal import pack_frame

TOKENS, HIDDEN = 4, 3
TILE_BYTES = TOKENS * HIDDEN * 4
LAYOUT = FeatureLayout(b"f" * 16, HIDDEN, "float32", TOKENS)
FLASH = dataclasses.replace(LAYOUT, is_flash=True)
REQUEST = b"r" * 16


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make_store(num_tiles=8, layout=LAYOUT, **options):
    return FeatureStore(layout, num_tiles * TILE_BYTES, **options)


def key(name, num_tiles=1):
    return ImageKey(name.encode().ljust(32, b"."), num_tiles * TOKENS)


async def reserve(store, keys, request_id=REQUEST, timeout=1.0, lifetime=60.0):
    return await store.reserve(request_id, keys, timeout=timeout, lifetime=lifetime)


def frame(tiles, *, image=0, first=0, of=None, attempt=0, request_id=REQUEST, **changes):
    """Header and rows of a frame; ``tiles`` is a number of full tiles or a list of token counts."""
    sizes = [TOKENS] * tiles if isinstance(tiles, int) else tiles
    rows = torch.arange(sum(sizes) * HIDDEN, dtype=torch.float32).reshape(-1, HIDDEN) + 1000 * first
    header = FrameHeader(
        LAYOUT.fingerprint,
        request_id,
        image,
        attempt,
        first,
        of or first + len(sizes),
        HIDDEN,
        "float32",
        tuple(sizes),
        0,
    )
    return with_checksum(dataclasses.replace(header, **changes), rows.numpy()), rows


def deliver(store, lease, header, rows, ticket=None):
    packed = pack_header(header, ticket or lease.missing.get(header.image_index, b"x" * 32))
    return receive_frame(store, packed, rows.numpy())


async def test_tiles_in_any_order_become_a_contiguous_prefix():
    store = make_store()
    lease = await reserve(store, [key("a", 3)])
    late, early = frame(1, first=2, of=3), frame(2, first=0, of=3)
    assert deliver(store, lease, *late) == "ok"
    assert store.num_ready_tokens(REQUEST, 0) == 0
    assert deliver(store, lease, *early) == "ok"
    assert store.num_ready_tokens(REQUEST, 0) == 12
    assert lease.is_complete
    expected = torch.cat([early[1], late[1]])
    for start in range(12):
        for stop in range(start + 1, 13):
            assert torch.equal(store.rows(REQUEST, 0, start, stop), expected[start:stop])


async def test_flash_tiles_are_counted_as_they_come():
    store = make_store(layout=FLASH)
    lease = await reserve(store, [key("a", 3)])
    assert deliver(store, lease, *frame([1, 4, 1])) == "ok"
    assert lease.tile_tokens == [[1, 4, 1]]
    assert store.reserved_bytes == 6 * HIDDEN * 4
    lease.release()
    assert (store.reserved_bytes, store.cached_bytes) == (0, 6 * HIDDEN * 4)


async def test_what_a_flash_image_will_have_at_least_is_known_from_the_start():
    store = make_store(layout=FLASH)
    lease = await reserve(store, [key("a", 3), key("b")])
    assert (lease.tile_tokens, lease.min_num_tokens, lease.awaited) == ([[], []], 3 + 1, {0, 1})
    assert deliver(store, lease, *frame([4], first=1, of=3)) == "ok"
    assert lease.min_num_tokens == 4  # its place is not known before the first tile's size
    assert deliver(store, lease, *frame([4], of=3)) == "ok"
    assert (lease.tile_tokens, lease.min_num_tokens) == ([[4, 4], []], 4 + 4 + 1 + 1)
    assert deliver(store, lease, *frame([1], first=2, of=3)) == "ok"
    assert (lease.tile_tokens, lease.min_num_tokens, lease.awaited) == ([[4, 4, 1], []], 9 + 1, {1})
    plain = await reserve(make_store(), [key("a", 3)])
    assert (plain.tile_tokens, plain.min_num_tokens, plain.tile_hashes) == ([[4, 4, 4]], 12, [3 * [key("a").mm_hash]])


def test_a_flash_tile_is_named_by_what_became_of_it_and_of_those_before():
    """Encoded again it may have other rows under the same key: KV of the one must not be taken for the other's."""
    names = {}
    for sizes in ([1, 4, 4], [4, 1, 1], [1, 4, 1], [1, 4, 4]):
        names[tuple(sizes)] = tile_hashes(key("a", 3), sizes, FLASH)
    assert names[1, 4, 4][:2] == names[1, 4, 1][:2]
    assert len({key("a", 3).mm_hash, *(name for own in names.values() for name in own)}) == 1 + 3 + 3 + 1


async def test_tiles_have_names_as_they_come():
    store = make_store(layout=FLASH)
    lease = await reserve(store, [key("a", 3)])
    assert (lease.tile_hashes, lease.num_known_tiles) == ([[]], [0])
    deliver(store, lease, *frame([1, 4], of=3))
    assert (lease.tile_hashes, lease.num_known_tiles) == ([tile_hashes(key("a", 3), [1, 4], FLASH)], [2])
    deliver(store, lease, *frame([4], first=2))
    assert (lease.tile_hashes, lease.num_known_tiles) == ([tile_hashes(key("a", 3), [1, 4, 4], FLASH)], [None])


async def test_a_complete_flash_image_serves_the_next_request_with_the_same_tiles():
    store = make_store(layout=FLASH)
    first = await reserve(store, [key("a", 3)])
    deliver(store, first, *frame([1, 4, 1]))
    first.release()
    again = await reserve(store, [key("a", 3)], b"s" * 16)
    assert (again.missing, again.tile_tokens, again.tile_hashes) == ({}, first.tile_tokens, first.tile_hashes)
    assert store.reserved_bytes == 6 * HIDDEN * 4


async def test_room_that_compression_left_goes_to_who_waits():
    store = make_store(num_tiles=4, layout=FLASH)
    lease = await reserve(store, [key("a", 3)])
    waiter = asyncio.create_task(reserve(store, [key("b", 3)], b"s" * 16))
    await asyncio.sleep(0)
    assert store.num_waiting == 1
    deliver(store, lease, *frame([1, 1, 1]))
    assert sorted((await waiter).missing) == [0]
    assert store.reserved_bytes == (3 + 3 * TOKENS) * HIDDEN * 4


async def test_a_tile_that_is_kept_does_not_keep_its_whole_frame():
    store = make_store()
    lease = await reserve(store, [key("a", 4)])
    deliver(store, lease, *frame(3, first=1, of=4))
    deliver(store, lease, *frame(4, of=4, attempt=1))
    image = lease.images[0]
    assert image.is_complete
    held = {tile.untyped_storage().data_ptr(): tile.untyped_storage().nbytes() for tile in image._prefix}
    assert sum(held.values()) == 4 * TILE_BYTES


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_attempts_that_differ_leave_each_tile_as_it_was_first_ready(data):
    """Two attempts cut and size the tiles in their own ways; their frames come in any order, twice."""
    asyncio.run(check_attempts(data))


async def check_attempts(data):
    num_tiles = data.draw(st.integers(1, 5))
    store = make_store(layout=FLASH)
    lease = await reserve(store, [key("a", num_tiles)])
    image = lease.images[0]
    frames = [each for attempt in (0, 1) for each in draw_attempt(data, attempt, num_tiles)]
    events = data.draw(st.permutations([(each, kind) for each in 2 * frames for kind in ("place", "finish")]))
    placed: dict[FrameHeader, memoryview] = {}
    expected: list[torch.Tensor | None] = [None] * num_tiles
    for (header, rows), kind in events:
        try:
            if kind == "place":
                placed[header] = store.place(header, pack_header(header, lease.missing[0]))
                continue
            if header not in placed:
                continue
            placed[header][:] = memoryview(rows.numpy()).cast("B")
            store.commit(header, placed[header], checksum(placed[header]))
        except FrameRejected as error:
            assert error.reason in ("duplicate", "stale")
            continue
        for index, tile in enumerate(rows.split(list(header.tokens_per_tile)), header.first_tile):
            expected[index] = tile if expected[index] is None else expected[index]
        check_image(store, image, expected)
    for header, rows in draw_attempt(data, 2, num_tiles):
        deliver(store, lease, header, rows)
    assert lease.is_complete
    assert lease.tile_tokens == [[len(tile) for tile in image._prefix]]
    assert all(old is None or len(old) == size for size, old in zip(lease.tile_tokens[0], expected, strict=True))
    assert store.reserved_bytes == image.num_bytes == sum(lease.tile_tokens[0]) * HIDDEN * 4
    assert (store.num_awaited, len(lease.deliveries[0].pending)) == (0, 0)


def draw_attempt(data, attempt, num_tiles):
    """Frames that hold every tile once, each tile with a size and rows of its own."""
    sizes = data.draw(st.lists(st.sampled_from((1, TOKENS)), min_size=num_tiles, max_size=num_tiles))
    edges = sorted({0, num_tiles, *data.draw(st.lists(st.integers(0, num_tiles), max_size=3))})
    frames = []
    for first, end in itertools.pairwise(edges):
        header, rows = frame(sizes[first:end], first=first, of=num_tiles, attempt=attempt)
        rows = rows + 100 * attempt
        frames.append((with_checksum(header, rows.numpy()), rows))
    return frames


def check_image(store, image, expected):
    prefix = list(itertools.takewhile(lambda tile: tile is not None, expected))
    assert store.num_ready_tokens(REQUEST, 0) == sum(map(len, prefix))
    assert image.tile_tokens == [len(tile) for tile in prefix]
    if prefix:
        whole = torch.cat(prefix)
        assert torch.equal(store.rows(REQUEST, 0, 0, len(whole)), whole)
        assert torch.equal(store.rows(REQUEST, 0, len(whole) - 1, len(whole)), whole[-1:])
    most = image.num_tiles * TILE_BYTES
    assert store.reserved_bytes == (sum(map(len, prefix)) * HIDDEN * 4 if image.is_complete else most)


@pytest.mark.parametrize(
    ("verdict", "changes"),
    [
        ("fingerprint", {"fingerprint": b"g" * 16}),
        ("unknown_request", {"request_id": b"q" * 16}),
        ("ticket", {"image_index": 1}),
        ("dtype", {"dtype": "bfloat16"}),
        ("shape", {"hidden_size": HIDDEN + 1}),
        ("shape", {"num_image_tiles": 3}),
        ("shape", {"tokens_per_tile": (TOKENS, TOKENS - 1)}),
        ("shape", {"tokens_per_tile": (1, 1)}),
    ],
)
async def test_a_wrong_header_is_refused_before_memory_is_touched(verdict, changes):
    store = make_store()
    lease = await reserve(store, [key("a", 2)])
    header, _ = frame(2, **changes)
    with pytest.raises(FrameRejected) as caught:
        store.place(header, pack_header(header, lease.missing[0]))
    assert caught.value.reason == verdict
    assert store.num_ready_tokens(REQUEST, 0) == 0


async def test_only_the_holder_of_the_ticket_may_write():
    store = make_store()
    lease = await reserve(store, [key("a"), key("b")])
    header, rows = frame(1)
    assert deliver(store, lease, header, rows, ticket=b"guess" * 6 + b"ab") == "ticket"
    assert deliver(store, lease, header, rows, ticket=lease.missing[1]) == "ticket"
    assert deliver(store, lease, header, rows) == "ok"


def deliver_sealed(store, ticket, frame, payload_of=None):
    """``payload_of``: the frame whose sealed payload goes in place of its own."""
    packed, payload = sealed(frame, ticket)
    if payload_of is not None:
        _, payload = sealed(payload_of, ticket)
    return receive_frame(store, packed, payload)


def sealed(frame, ticket):
    header, rows = frame
    return pack_frame(header, rows.numpy().view(np.uint8).reshape(-1).data, ticket, is_sealed=True)


async def test_a_store_that_seals_takes_nothing_in_clear():
    store = make_store(seals_features=True)
    lease = await reserve(store, [key("a", 2), key("b")])
    first, second = frame(1, of=2), frame(1, first=1)
    assert deliver(store, lease, *first) == "unsealed"
    assert deliver(store, lease, first[0], first[1], ticket=b"x" * 32) == "ticket"  # of strangers no more is said
    assert deliver_sealed(store, lease.missing[1], first) == "ticket"
    assert deliver_sealed(store, lease.missing[0], first, payload_of=second) == "seal"
    assert store.num_ready_tokens(REQUEST, 0) == 0
    assert deliver_sealed(store, lease.missing[0], first) == "ok"
    assert deliver_sealed(store, lease.missing[0], second) == "ok"
    assert deliver_sealed(store, lease.missing[0], second) == "duplicate"
    assert torch.equal(store.rows(REQUEST, 0, 0, 2 * TOKENS), torch.cat([first[1], second[1]]))
    ticket = lease.missing[0]
    lease.release()
    assert deliver_sealed(store, ticket, first) == "tombstone"


async def test_who_need_not_seal_may():
    store = make_store()
    lease = await reserve(store, [key("a")])
    sent = frame(1)
    assert deliver_sealed(store, lease.missing[0], sent) == "ok"
    assert torch.equal(store.rows(REQUEST, 0, 0, TOKENS), sent[1])


async def test_two_servers_that_seal_one_tile_do_not_disturb_each_other():
    """A second attempt on its way beside the first: each is opened in memory of its own, under its own nonce."""
    store = make_store(seals_features=True)
    lease = await reserve(store, [key("a")])
    sent = [sealed(frame(1, attempt=attempt), lease.missing[0]) for attempt in (0, 1)]
    headers = [parse_header(packed) for packed, _ in sent]
    placed = [store.place(header, packed) for header, (packed, _) in zip(headers, sent, strict=True)]
    for memory, (_, payload) in zip(placed, sent, strict=True):
        memory[:] = payload
    store.commit(headers[1], placed[1], 0)
    with pytest.raises(FrameRejected, match="duplicate"):
        store.commit(headers[0], placed[0], 0)
    assert torch.equal(store.rows(REQUEST, 0, 0, TOKENS), frame(1)[1])


async def test_a_ticket_expires():
    clock = Clock()
    store = make_store(clock=clock)
    lease = await reserve(store, [key("a")], lifetime=5)
    clock.now += 6
    assert deliver(store, lease, *frame(1)) == "ticket"


async def test_a_damaged_or_broken_payload_is_refused_and_may_come_again():
    store = make_store()
    lease = await reserve(store, [key("a")])
    header, rows = frame(1)
    assert deliver(store, lease, header, rows + 1) == "checksum"
    broken = rows.clone()
    broken[2, 1] = float("nan")
    assert deliver(store, lease, with_checksum(header, broken.numpy()), broken) == "nonfinite"
    assert deliver(store, lease, header, rows[:2]) == "size"
    assert not lease.is_complete
    assert deliver(store, lease, header, rows) == "ok"


async def test_a_ready_tile_is_never_written_again():
    store = make_store()
    lease = await reserve(store, [key("a", 3)])
    first, rows = frame(1, of=3)
    assert deliver(store, lease, first, rows) == "ok"
    assert deliver(store, lease, first, rows) == "duplicate"
    # A second attempt groups the tiles in another way; the first tile keeps its first content.
    second, others = frame(3, attempt=1)
    others = others + 7
    assert deliver(store, lease, with_checksum(second, others.numpy()), others) == "ok"
    assert torch.equal(store.rows(REQUEST, 0, 0, 12), torch.cat([rows, others[TOKENS:]]))


async def test_a_lower_attempt_is_stale_once_a_higher_one_has_begun():
    store = make_store()
    lease = await reserve(store, [key("a", 2)])
    ahead, _ = frame(1, of=2, attempt=1)
    store.place(ahead, pack_header(ahead, lease.missing[0]))
    assert deliver(store, lease, *frame(1, of=2, attempt=0)) == "stale"
    assert deliver(store, lease, *frame(2, attempt=0)) == "stale"  # one of its tiles is
    assert deliver(store, lease, *frame(1, of=2, attempt=1)) == "ok"
    assert deliver(store, lease, *frame(1, of=2, attempt=0)) == "duplicate"
    assert not lease.is_complete


async def test_tiles_from_another_server_have_attempts_of_their_own():
    """The first half was sent again elsewhere; the second half still comes from its first server."""
    store = make_store()
    lease = await reserve(store, [key("a", 4)])
    assert deliver(store, lease, *frame(2, of=4, attempt=3)) == "ok"
    assert deliver(store, lease, *frame(1, first=2, of=4, attempt=0)) == "ok"
    assert deliver(store, lease, *frame(1, first=3, of=4, attempt=1)) == "ok"
    assert lease.is_complete


async def test_a_late_writer_cannot_touch_what_is_ready():
    """Two attempts of a tile are under way at once; the slower one finishes writing after the tile is ready."""
    store = make_store()
    lease = await reserve(store, [key("a")])
    slow, rows = frame(1)
    fast = dataclasses.replace(slow, attempt=1)
    slow_memory = store.place(slow, pack_header(slow, lease.missing[0]))
    fast_memory = store.place(fast, pack_header(fast, lease.missing[0]))
    fast_memory[:] = memoryview(rows.numpy()).cast("B")
    store.commit(fast, fast_memory, checksum(fast_memory))
    slow_memory[:] = bytes(len(slow_memory))
    assert torch.equal(store.rows(REQUEST, 0, 0, TOKENS), rows)
    with pytest.raises(FrameRejected, match="duplicate"):
        store.commit(slow, slow_memory, slow.payload_crc32c)


async def test_unfinished_frames_are_bounded():
    store = make_store()
    lease = await reserve(store, [key("a")])
    headers = [frame(1, attempt=attempt)[0] for attempt in range(5)]
    placed = [store.place(header, pack_header(header, lease.missing[0])) for header in headers]
    with pytest.raises(FrameRejected, match="stale"):
        store.commit(headers[0], placed[0], headers[0].payload_crc32c)


async def test_who_began_a_frame_first_does_not_commit_what_another_has_half_written():
    store = make_store()
    lease = await reserve(store, [key("a")])
    header, rows = frame(1)
    first = store.place(header, pack_header(header, lease.missing[0]))
    second = store.place(header, pack_header(header, lease.missing[0]))
    first[:] = memoryview(rows.numpy()).cast("B")
    with pytest.raises(FrameRejected, match="stale"):
        store.commit(header, first, checksum(first))
    assert store.num_ready_tokens(REQUEST, 0) == 0
    second[:] = memoryview(rows.numpy()).cast("B")
    store.commit(header, second, checksum(second))
    assert torch.equal(store.rows(REQUEST, 0, 0, TOKENS), rows)


async def test_no_memory_is_asked_for_before_the_header_has_passed_every_check():
    store = make_store()
    lease = await reserve(store, [key("a")])
    header, _ = frame(1)
    asked: list[int] = []
    with pytest.raises(FrameRejected, match="ticket"):
        store.place(header, pack_header(header, b"x" * 32), lambda: asked.append(1))
    assert not asked
    store.place(header, pack_header(header, lease.missing[0]), lambda: asked.append(1))  # has none: the store's own
    assert asked == [1]


async def test_features_may_stay_where_they_came():
    store = make_store()
    lease = await reserve(store, [key("a")])
    header, rows = frame(1)
    memory = bytearray(rows.numpy().tobytes())
    view = store.place(header, pack_header(header, lease.missing[0]), lambda: memory)
    store.commit(header, view, checksum(view))
    assert store.rows(REQUEST, 0, 0, TOKENS).data_ptr() == torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert torch.equal(store.rows(REQUEST, 0, 0, TOKENS), rows)


async def test_frames_after_the_end_meet_a_tombstone():
    store = make_store()
    lease = await reserve(store, [key("a", 2)])
    ticket = lease.missing[0]
    header, rows = frame(1, of=2)
    memory = store.place(header, pack_header(header, ticket))
    lease.release()
    lease.release()
    with pytest.raises(FrameRejected, match="tombstone"):
        store.commit(header, memory, header.payload_crc32c)
    assert deliver(store, lease, header, rows, ticket=ticket) == "tombstone"


async def test_tombstones_expire():
    clock = Clock()
    store = make_store(clock=clock)
    (await reserve(store, [key("a")])).release()
    clock.now += 1000
    (await reserve(store, [key("a")], b"s" * 16)).release()
    header, _ = frame(1)
    with pytest.raises(FrameRejected, match="unknown_request"):
        store.place(header, pack_header(header, b"x" * 32))


async def test_equal_images_are_asked_for_once():
    store = make_store()
    lease = await reserve(store, [key("a"), key("b"), key("a")])
    assert sorted(lease.missing) == [0, 1]
    assert store.reserved_bytes == 2 * TILE_BYTES
    assert deliver(store, lease, *frame(1)) == "ok"
    assert store.num_ready_tokens(REQUEST, 2) == TOKENS
    # An image that is complete serves others while its first user lives, and afterwards.
    other = await reserve(store, [key("a")], b"s" * 16)
    assert other.missing == {} and other.is_complete
    lease.release()
    other.release()
    assert (store.reserved_bytes, store.cached_bytes) == (0, TILE_BYTES)
    again = await reserve(store, [key("b"), key("a")], b"t" * 16)
    assert sorted(again.missing) == [0]


async def test_requests_share_an_image_under_way_and_each_may_have_it_delivered():
    """Whose request is cancelled takes its encoding with it; the other one's goes on."""
    store = make_store()
    first, second = await reserve(store, [key("a", 2)]), await reserve(store, [key("b"), key("a", 2)], b"s" * 16)
    assert (sorted(first.missing), sorted(second.missing)) == ([0], [0, 1])
    assert store.reserved_bytes == 3 * TILE_BYTES
    assert deliver(store, first, *frame(1, of=2, attempt=2)) == "ok"
    assert store.num_ready_tokens(b"s" * 16, 1) == TOKENS
    first.release()
    assert (store.reserved_bytes, store.num_awaited) == (3 * TILE_BYTES, 2)
    # The other's attempts are counted apart.
    assert deliver(store, second, *frame(1, of=2, image=1, request_id=b"s" * 16)) == "duplicate"
    waiter = asyncio.create_task(second.wait_complete(10))
    await asyncio.sleep(0)
    assert deliver(store, second, *frame(1, first=1, image=1, request_id=b"s" * 16)) == "ok"
    assert deliver(store, second, *frame(1, image=0, request_id=b"s" * 16)) == "ok"
    await waiter
    second.release()
    assert (store.reserved_bytes, store.cached_bytes) == (0, 3 * TILE_BYTES)


async def test_what_comes_for_one_request_completes_the_other():
    store = make_store()
    first, second = await reserve(store, [key("a")]), await reserve(store, [key("a")], b"s" * 16)
    slow, _ = frame(1, request_id=b"s" * 16)
    memory = store.place(slow, pack_header(slow, second.missing[0]))
    waiter = asyncio.create_task(second.wait_complete(10))
    await asyncio.sleep(0)
    assert deliver(store, first, *frame(1)) == "ok"
    await waiter
    assert second.state is LeaseState.READY
    with pytest.raises(FrameRejected, match="duplicate"):
        store.commit(slow, memory, slow.payload_crc32c)


async def test_an_image_whose_kv_is_held_needs_no_room_and_waits_behind_nobody():
    store = make_store(num_tiles=2)
    held = await reserve(store, [key("a", 2)])
    line = asyncio.create_task(reserve(store, [key("b")], b"s" * 16))
    await asyncio.sleep(0)
    lease = store.try_reserve(b"t" * 16, [key("c", 2)], lifetime=60, computed={0: [TOKENS, TOKENS]})
    assert lease.missing == {} and lease.is_complete and lease.tile_tokens == [[TOKENS, TOKENS]]
    assert store.num_ready_tokens(b"t" * 16, 0) == 2 * TOKENS
    with pytest.raises(InternalError):
        store.rows(b"t" * 16, 0, 0, 1)
    assert store.reserved_bytes == 2 * TILE_BYTES
    assert store.try_reserve(b"u" * 16, [key("c"), key("d")], lifetime=60, computed={0: [TOKENS]}) is None
    lease.release()
    held.release()
    (await line).release()
    assert (store.reserved_bytes, store.num_waiting) == (0, 0)


async def test_the_same_image_may_lie_in_the_cache_once_and_be_needed_once():
    store = make_store()
    lease = store.try_reserve(REQUEST, [key("a"), key("a")], lifetime=60, computed={0: [TOKENS]})
    assert sorted(lease.missing) == [1]
    header, rows = frame(1, image=0)
    assert deliver(store, lease, header, rows, ticket=lease.missing[1]) == "ticket"
    assert deliver(store, lease, *frame(1, image=1)) == "ok"
    assert lease.is_complete


async def test_what_became_of_a_flash_image_is_known_after_it_was_dropped():
    store = make_store(num_tiles=3, layout=FLASH)
    assert make_store().known_tiles(key("a", 2)) == [TOKENS, TOKENS]
    assert store.known_tiles(key("a", 2)) is None
    for name, sizes in (("a", [1, 4]), ("b", [4, 4, 4])):
        lease = await reserve(store, [key(name, len(sizes))])
        deliver(store, lease, *frame(sizes))
        lease.release()
    assert not store.has(key("a", 2)) and store.has(key("b", 3))
    assert store.known_tiles(key("a", 2)) == [1, 4]
    lease = store.try_reserve(REQUEST, [key("a", 2)], lifetime=60, computed={0: [1, 4]})
    assert lease.tile_hashes == [tile_hashes(key("a", 2), [1, 4], FLASH)]


async def test_a_reservation_of_which_nothing_comes_expires():
    expired = metrics.TRANSFER_RESERVATIONS_EXPIRED._value.get()
    store = make_store()
    lease = await reserve(store, [key("a", 2)])
    header, rows = frame(1, of=2)
    memory = store.place(header, pack_header(header, lease.missing[0]))
    with pytest.raises(DeadlineExceeded):
        await lease.wait_complete(0.01)
    assert metrics.TRANSFER_RESERVATIONS_EXPIRED._value.get() == expired + 1
    # Its sequences may still be in the engine: the memory goes back with the lease. Its writer may still write.
    assert (lease.state, store.reserved_bytes) == (LeaseState.EXPIRED, 2 * TILE_BYTES)
    memory[:] = memoryview(rows.numpy()).cast("B")
    with pytest.raises(FrameRejected, match="tombstone"):
        store.commit(header, memory, checksum(memory))
    assert deliver(store, lease, header, rows) == "tombstone"
    with pytest.raises(DeadlineExceeded):
        await lease.wait_complete(1)
    lease.release()
    assert (store.reserved_bytes, store.cached_bytes) == (0, 0)


async def test_nobody_waits_longer_than_tickets_are_good():
    lease = await reserve(make_store(), [key("a")], lifetime=0.01)
    with pytest.raises(DeadlineExceeded):
        await lease.wait_complete(100)
    assert lease.state is LeaseState.EXPIRED


async def test_kept_images_give_way_to_new_ones_oldest_first():
    store = make_store(num_tiles=2)
    for name in "ab":
        lease = await reserve(store, [key(name)])
        deliver(store, lease, *frame(1))
        lease.release()
    lease = await reserve(store, [key("c")])
    assert (store.reserved_bytes, store.cached_bytes) == (TILE_BYTES, TILE_BYTES)
    lease.release()
    assert (await reserve(store, [key("b")])).missing == {}
    assert sorted((await reserve(store, [key("a")], b"s" * 16)).missing) == [0]


async def test_reservations_are_all_or_nothing_and_first_come_first_served():
    store = make_store(num_tiles=4)
    first = await reserve(store, [key("a", 3)])
    big = asyncio.create_task(reserve(store, [key("b", 2), key("c", 1)], b"s" * 16))
    small = asyncio.create_task(reserve(store, [key("d", 1)], b"t" * 16))
    await asyncio.sleep(0)
    assert store.num_waiting == 2  # the small one would fit, but is not first
    first.release()
    assert sorted((await big).missing) == [0, 1]
    assert sorted((await small).missing) == [0]
    assert store.free_bytes == 0


async def test_whoever_leaves_the_line_lets_the_next_one_in():
    store = make_store(num_tiles=4)
    first = await reserve(store, [key("a", 3)])
    big = asyncio.create_task(reserve(store, [key("b", 4)], b"s" * 16))
    small = asyncio.create_task(reserve(store, [key("d", 1)], b"t" * 16))
    await asyncio.sleep(0)
    big.cancel()
    (await small).release()
    first.release()
    assert (store.num_waiting, store.reserved_bytes) == (0, 0)


async def test_a_grant_in_the_moment_of_leaving_is_given_back():
    store = make_store(num_tiles=1)
    first = await reserve(store, [key("a")])
    waiter = asyncio.create_task(reserve(store, [key("b")], b"s" * 16))
    await asyncio.sleep(0)
    first.release()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert store.reserved_bytes == 0


async def test_waiting_for_space_ends():
    store = make_store(num_tiles=1, max_waiting=1)
    await reserve(store, [key("a")])
    waiter = asyncio.create_task(reserve(store, [key("b")], b"s" * 16, timeout=0.01))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await reserve(store, [key("c")], b"t" * 16)
    with pytest.raises(DeadlineExceeded):
        await waiter
    assert store.num_waiting == 0


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ([key("a", 9)], None),
        ([key("a"), ImageKey(bytes(32), 0)], "images[1].max_num_tokens"),
        ([ImageKey(bytes(32), TOKENS + 1)], "images[0].max_num_tokens"),
        ([key("a", MAX_TILES + 1)], "images[0].max_num_tokens"),  # no frame could say so
    ],
)
async def test_what_can_never_fit_is_refused(keys, param):
    with pytest.raises(InvalidRequest) as caught:
        await reserve(make_store(), keys)
    assert caught.value.param == param


async def test_a_request_id_is_used_once_at_a_time():
    store = make_store()
    lease = await reserve(store, [key("a")])
    with pytest.raises(InvalidRequest):
        await reserve(store, [key("b")])
    lease.release()
    await reserve(store, [key("b")])


async def test_waiting_for_features_ends_with_the_last_tile():
    store = make_store()
    lease = await reserve(store, [key("a", 2)])
    waiter = asyncio.create_task(lease.wait_complete(10))
    await asyncio.sleep(0)
    deliver(store, lease, *frame(1, of=2))
    await asyncio.sleep(0)
    assert not waiter.done()
    deliver(store, lease, *frame(1, first=1))
    await waiter


async def test_the_engine_is_told_of_ready_tiles():
    calls = []
    store = make_store(on_ready=lambda: calls.append(1))
    lease = await reserve(store, [key("a")])
    deliver(store, lease, *frame(1))
    assert calls == [1]
