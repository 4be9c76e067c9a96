"""Reservations against a model of docs/reservations.md, in any order of asking, writing, giving up and ending."""

import asyncio
import dataclasses
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.service import metrics
from language_server.reservation import LeaseState
from protos.frame import FrameRejected, checksum, pack_header, with_checksum
from tests.language_server.test_features import TILE_BYTES, TOKENS, Clock, frame, key, make_store

CAPACITY = 6
"""Tiles."""
LIFETIME = 50.0
"""Seconds for which tickets are good."""


@dataclass
class Asked:
    """What the model knows of a request."""

    names: list[str]  # of images; the last character says how many tiles each has
    expires: float
    computed: set[int] = field(default_factory=set)
    state: str = "waiting"
    tickets: dict[int, bytes] = field(default_factory=dict)
    attempts: dict[tuple[int, int], int] = field(default_factory=dict)  # the highest, by image index and tile

    @property
    def needed(self):
        return {name for index, name in enumerate(self.names) if index not in self.computed}


def tiles_of(name):
    return int(name[-1])


def reason_of(rejection):
    """Tombstones are not kept for ever."""
    return "tombstone" if rejection.reason == "unknown_request" else rejection.reason


class Reservations(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.store = make_store(CAPACITY, max_waiting=3, clock=self.clock)
        self.asked: dict[bytes, Asked] = {}  # not released
        self.line: list[bytes] = []
        self.tasks, self.leases, self.gone = {}, {}, {}
        self.ready: dict[str, dict[int, int]] = {}  # images in use: what was written into each tile that is ready
        self.writers = []
        self.count = 0

    # --- the model

    @property
    def reserved(self):
        return sum(map(tiles_of, self.ready))

    def users(self, name):
        return [a for a in self.asked.values() if a.state in ("writing", "ready", "expired") and name in a.needed]

    def is_complete(self, name):
        return len(self.ready[name]) == tiles_of(name)

    def fits(self, asked):
        return self.reserved + sum(tiles_of(name) for name in asked.needed - self.ready.keys()) <= CAPACITY

    def grant(self, request_id):
        """What is granted, and nothing but that, is a lease now."""
        asked, lease = self.asked[request_id], self.leases[request_id]
        for index, name in enumerate(asked.names):
            if index in asked.computed:
                continue
            is_first = name not in asked.names[:index] or all(
                i in asked.computed for i, other in enumerate(asked.names[:index]) if other == name
            )
            if name in self.ready:
                assert (index in lease.missing) == (is_first and not self.is_complete(name))
            elif index in lease.missing:
                self.ready[name] = {}
            else:  # it was kept for reuse: whatever it holds is what it held
                rows = self.store.rows(request_id, index, 0, tiles_of(name) * TOKENS)
                self.ready[name] = {tile: int(rows[tile * TOKENS, 0]) for tile in range(tiles_of(name))}
        asked.tickets = dict(lease.missing)
        self.settle_state(asked)

    def settle_state(self, asked):
        if asked.state in ("waiting", "writing"):
            asked.state = "ready" if all(map(self.is_complete, asked.needed)) else "writing"

    def drop_unused(self):
        for name in [name for name in self.ready if not self.users(name)]:
            del self.ready[name]

    def serve_line(self):
        """First come, first served: the model says who must have been let in by now, and in which order."""
        self.drop_unused()
        while self.line and self.fits(self.asked[self.line[0]]):
            request_id = self.line.pop(0)
            assert request_id in self.leases, "whoever fits and is first is let in"
            self.grant(request_id)
        assert not set(self.line) & set(self.leases), "nobody overtakes"

    # --- the world

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    async def collect(self):
        for _ in range(4):
            await asyncio.sleep(0)
        for request_id, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[request_id]
                if not task.cancelled() and task.exception() is None:
                    self.leases[request_id] = task.result()

    def settle(self):
        self.run(self.collect())
        self.serve_line()

    def leave(self, request_id):
        self.gone[request_id] = self.asked.pop(request_id)

    def new_request(self, images):
        self.count += 1
        asked = Asked([f"{name}{tiles}" for name, tiles in images], self.clock.now + LIFETIME)
        return self.count.to_bytes(16, "big"), asked, [key(name, tiles_of(name)) for name in asked.names]

    # --- what may happen

    @precondition(lambda self: len(self.line) < 3)
    @rule(images=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), max_size=3))
    def request(self, images):
        request_id, asked, keys = self.new_request(images)
        if sum(map(tiles_of, asked.needed)) > CAPACITY:
            return
        self.asked[request_id] = asked

        async def start():
            call = self.store.reserve(request_id, keys, timeout=1000.0, lifetime=LIFETIME)
            self.tasks[request_id] = asyncio.create_task(call)
            await self.collect()

        may_enter = not asked.needed or (not self.line and self.fits(asked))
        self.run(start())
        assert (request_id in self.leases) == may_enter
        if may_enter:
            self.grant(request_id)
        else:
            self.line.append(request_id)

    @rule(images=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 2)), min_size=1, max_size=3), data=st.data())
    def request_with_kv(self, images, data):
        request_id, asked, keys = self.new_request(images)
        asked.computed = set(range(data.draw(st.integers(1, len(keys)))))
        computed = {index: [TOKENS] * tiles_of(asked.names[index]) for index in asked.computed}
        may_enter = not asked.needed or (not self.line and self.fits(asked))
        lease = self.store.try_reserve(request_id, keys, lifetime=LIFETIME, computed=computed)
        assert (lease is not None) == may_enter
        if lease is not None:
            assert not asked.computed & lease.missing.keys()
            self.asked[request_id], self.leases[request_id] = asked, lease
            self.grant(request_id)

    def holders(self):
        return [
            (request_id, index, ticket)
            for request_id, asked in (self.asked | self.gone).items()
            for index, ticket in asked.tickets.items()
        ]

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), attempt=st.integers(0, 2), has_ticket=st.booleans())
    def begin_to_write(self, data, attempt, has_ticket):
        request_id, index, ticket = data.draw(st.sampled_from(self.holders()))
        asked = self.asked.get(request_id) or self.gone[request_id]
        tile = data.draw(st.integers(0, tiles_of(asked.names[index]) - 1))
        self.begin(request_id, index, tile, attempt, ticket if has_ticket else b"x" * 32, has_ticket)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), attempt=st.integers(0, 2))
    def another_begins_the_same(self, data, attempt):
        request_id, header, *_ = self.writers[data.draw(st.integers(0, len(self.writers) - 1))]
        asked = self.asked.get(request_id) or self.gone[request_id]
        self.begin(request_id, header.image_index, header.first_tile, attempt, asked.tickets[header.image_index])

    def begin(self, request_id, index, tile, attempt, ticket, has_ticket=True):
        asked = self.asked.get(request_id) or self.gone[request_id]
        num_tiles = tiles_of(asked.names[index])
        self.count += 1
        header, rows = frame(1, image=index, first=tile, of=num_tiles, attempt=attempt, request_id=request_id)
        rows = rows * 0 + self.count
        header = with_checksum(header, rows.numpy())
        expected = self.verdict(request_id, asked, index, tile, attempt, has_ticket)
        try:
            view = self.store.place(header, pack_header(header, ticket))
        except FrameRejected as rejection:
            assert reason_of(rejection) == expected
            return
        assert expected == "ok"
        asked.attempts[index, tile] = attempt
        self.writers.append((request_id, header, view, rows, self.count))

    def verdict(self, request_id, asked, index, tile, attempt, has_ticket=True):
        if request_id not in self.asked or asked.state == "expired":
            return "tombstone"
        if not has_ticket or self.clock.now > asked.expires:
            return "ticket"
        if tile in self.ready[asked.names[index]]:
            return "duplicate"
        return "stale" if attempt < asked.attempts.get((index, tile), 0) else "ok"

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), is_damaged=st.booleans())
    def finish_writing(self, data, is_damaged):
        """Also long after the request has ended: its writer may still touch the memory."""
        request_id, header, view, rows, value = self.writers.pop(
            data.draw(st.integers(0, len(self.writers) - 1), label="writer")
        )
        view[:] = memoryview(rows.numpy()).cast("B")
        asked = self.asked.get(request_id) or self.gone[request_id]
        index, tile = header.image_index, header.first_tile
        try:
            self.store.commit(header, view, checksum(view) ^ is_damaged)
        except FrameRejected as rejection:
            expected = self.verdict(request_id, asked, index, tile, header.attempt)
            # A frame that was begun in time is good, however late; and it may have been crowded out.
            allowed = {"ok": {"stale"}, "ticket": {"stale", "duplicate"}}.get(expected, {expected, "stale"})
            assert reason_of(rejection) in allowed | ({"checksum"} if is_damaged else set())
        else:
            assert not is_damaged and asked.state == "writing"
            assert tile not in self.ready[asked.names[index]]
            self.ready[asked.names[index]][tile] = value
            for other in self.users(asked.names[index]):
                self.settle_state(other)
        self.settle()

    @precondition(lambda self: any(asked.state == "writing" for asked in self.asked.values()))
    @rule(data=st.data())
    def expire(self, data):
        writing = [request_id for request_id, asked in self.asked.items() if asked.state == "writing"]
        request_id = data.draw(st.sampled_from(writing))
        before = metrics.TRANSFER_RESERVATIONS_EXPIRED._value.get()
        self.leases[request_id].expire()
        self.asked[request_id].state = "expired"
        assert metrics.TRANSFER_RESERVATIONS_EXPIRED._value.get() == before + 1
        self.settle()

    @rule(seconds=st.sampled_from((1.0, 20.0, LIFETIME + 1)))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases.pop(request_id)
        self.leave(request_id)
        lease.release()
        lease.release()
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data):
        request_id = data.draw(st.sampled_from(self.line))
        self.line.remove(request_id)
        del self.asked[request_id]
        self.tasks[request_id].cancel()
        self.settle()

    # --- what always holds

    @invariant()
    def the_books_balance(self):
        store = self.store
        assert store.reserved_bytes == self.reserved * TILE_BYTES
        assert store.reserved_bytes + store.cached_bytes <= CAPACITY * TILE_BYTES
        assert store.num_awaited == sum(not self.is_complete(name) for name in self.ready)
        assert store.num_waiting == len(self.line)

    @invariant()
    def states_are_those_of_the_model(self):
        assert self.leases.keys() == self.asked.keys() - set(self.line)
        for request_id, lease in self.leases.items():
            assert lease.state is LeaseState(self.asked[request_id].state)

    @invariant()
    def gauges_are_those_of_the_model(self):
        for state in ("waiting", "writing", "ready", "expired"):
            asked = [a for a in self.asked.values() if a.state == state and a.needed]
            assert metrics.TRANSFER_RESERVATIONS.labels(state)._value.get() == len(asked), state
        assert metrics.TRANSFER_POOL_BYTES.labels("reserved")._value.get() == self.reserved * TILE_BYTES

    @invariant()
    def what_is_ready_never_changes(self):
        for request_id, asked in self.asked.items():
            for index, name in enumerate(asked.names):
                if index in asked.computed or asked.state == "waiting":
                    continue
                tiles = self.ready[name]
                num_ready = next((tile for tile in range(tiles_of(name)) if tile not in tiles), tiles_of(name))
                assert self.store.num_ready_tokens(request_id, index) == num_ready * TOKENS
                for tile in range(num_ready):
                    rows = self.store.rows(request_id, index, tile * TOKENS, (tile + 1) * TOKENS)
                    assert (rows == tiles[tile]).all()

    def teardown(self):
        """Nobody is left: everything comes back, whoever still writes."""
        for request_id in list(self.line):
            self.tasks[request_id].cancel()
        self.line.clear()
        self.run(self.collect())
        for lease in self.leases.values():
            lease.release()
        store = self.store
        assert (store.reserved_bytes, store.num_waiting, store.num_awaited, len(store._leases)) == (0, 0, 0, 0)
        assert store.cached_bytes == sum(image.num_bytes for image in store._images.values())
        self.loop.close()


TestReservations = Reservations.TestCase
TestReservations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_model_is_right_about_what_a_reservation_holds():
    assert dataclasses.replace(Asked(["a2", "b1", "a2"], 0.0), computed={1}).needed == {"a2"}
