"""Scheduling without a model: who runs, who waits, who yields, and that nothing is lost."""

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from language_server.block_manager import BlockManager
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.pace import NO_LIMITS, PrefillLimits
from language_server.scheduler import Scheduler
from language_server.sequence import SamplingParams, Sequence, SequenceStatus


class Readiness:
    """Rows that have arrived, by request and image."""

    def __init__(self):
        self.rows = defaultdict(int)

    def num_ready_tokens(self, request_id, image_index):
        return self.rows[request_id, image_index]


class World:
    """A scheduler, and a model that computes whatever it is told and always answers 7."""

    def __init__(self, *, num_blocks=64, block_size=4, max_num_seqs=8, budget=16, caching=True):
        self.readiness = Readiness()
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            self.blocks, self.readiness, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        self.num_added = 0

    def add(self, num_tokens, *, image=None, max_tokens=4, request=None, priority=0):
        """``image``: (start, num_tokens). Prompts of different sequences differ unless they name the same request."""
        seq_id = self.num_added
        self.num_added += 1
        request = seq_id if request is None else request
        spans = [] if image is None else [ImageSpan(0, image[0], image[1], bytes([request % 256]))]
        prompt = [1000 * request + token for token in range(num_tokens)]
        sampling = SamplingParams(max_tokens=max_tokens)
        sequence = Sequence(seq_id, str(request).encode(), prompt, sampling, ImageSpans(spans), priority=priority)
        self.scheduler.add(sequence)
        return sequence

    def add_video(self, num_frames, rows_per_frame, *, text_per_frame=2, max_tokens=4):
        """Frames with text before each, and some behind the last."""
        step = text_per_frame + rows_per_frame
        spans = [
            ImageSpan(0, frame * step + text_per_frame, rows_per_frame, b"v", frame * rows_per_frame)
            for frame in range(num_frames)
        ]
        seq_id = self.num_added
        self.num_added += 1
        prompt = [1000 * seq_id + token for token in range(num_frames * step + 3)]
        sampling = SamplingParams(max_tokens=max_tokens)
        sequence = Sequence(seq_id, str(seq_id).encode(), prompt, sampling, ImageSpans(spans))
        self.scheduler.add(sequence)
        return sequence

    def deliver(self, sequence, num_rows):
        self.readiness.rows[sequence.request_id, 0] = num_rows

    def step(self, limits=NO_LIMITS):
        """Run one step; returns tokens by seq_id."""
        chunks = self.scheduler.schedule(limits)
        for chunk in chunks:
            assert chunk.start == chunk.sequence.num_computed_tokens
            assert len(chunk.sequence.block_table) == self.blocks.blocks_needed(chunk.end)
            is_sampled = chunk.is_sampled
            self.blocks.commit(chunk.sequence, chunk.end)
            if is_sampled:
                chunk.sequence.append(7)
                if len(chunk.sequence.output_token_ids) == chunk.sequence.sampling.max_tokens:
                    self.scheduler.remove(chunk.sequence)
        return {chunk.sequence.seq_id: chunk.num_tokens for chunk in chunks}

    def run(self, max_steps=500):
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


def test_a_long_prompt_is_prefilled_in_chunks_within_the_budget():
    world = World(budget=16)
    sequence = world.add(40)
    assert [world.step() for _ in range(3)] == [{0: 16}, {0: 16}, {0: 8}]
    assert sequence.output_token_ids == [7]
    assert world.step() == {0: 1}


def test_prompts_are_held_back_only_beside_sequences_that_generate():
    world = World(budget=16)
    world.add(10)
    few = PrefillLimits(4, 4)
    assert world.step(few) == {0: 10}
    world.add(10)
    assert [world.step(few) for _ in range(3)] == [{0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 2}]


def test_prompts_with_images_have_a_limit_of_their_own():
    world = World(budget=32)
    world.add(4, max_tokens=20)
    world.step()
    image = world.add(12, image=(2, 4))
    world.deliver(image, 4)
    limits = PrefillLimits(text_tokens=8, image_tokens=3)
    assert [world.step(limits) for _ in range(2)] == [{0: 1, 1: 3}, {0: 1, 1: 3}]
    world.add(40)
    # Who is first takes turns: text leaves nothing of the images' share, they leave most of what text may have.
    assert [world.step(limits) for _ in range(2)] == [{0: 1, 2: 8}, {0: 1, 1: 3, 2: 5}]


def test_decode_goes_first_and_shares_the_step_with_prefill():
    world = World(budget=16)
    world.add(4, max_tokens=20)
    world.step()
    world.add(100)
    for _ in range(5):
        assert world.step() == {0: 1, 1: 15}


def test_every_generating_sequence_is_in_every_step():
    world = World(budget=8, max_num_seqs=8, num_blocks=256)
    short = [world.add(1, max_tokens=50) for _ in range(7)]
    world.step()
    world.add(400)
    for _ in range(10):
        step = world.step()
        assert all(step[sequence.seq_id] == 1 for sequence in short)
        assert sum(step.values()) <= 8


def test_a_smaller_priority_is_served_first():
    world = World(max_num_seqs=1, budget=64)
    world.add(4, max_tokens=1)
    world.step()
    for priority in (5, 0, -3, 0):
        world.add(4, max_tokens=1, priority=priority)
    assert [world.step() for _ in range(4)] == [{3: 4}, {2: 4}, {4: 4}, {1: 4}]


def test_a_long_prompt_lets_an_urgent_one_pass():
    world = World(budget=16)
    world.add(100)
    world.step()
    world.add(20, priority=-1)
    assert [world.step() for _ in range(2)] == [{1: 16}, {1: 4, 0: 12}]
    world.add(20, priority=1)
    assert world.step() == {1: 1, 0: 15}


def test_the_least_urgent_yields_though_it_came_first():
    world = World(num_blocks=6, block_size=4, caching=False)
    last = world.add(8, max_tokens=12, priority=1)
    world.step()
    others = [world.add(8, max_tokens=12) for _ in range(2)]
    world.run()
    assert last.num_preemptions > 0
    assert others[0].num_preemptions == 0
    assert all(len(sequence.output_token_ids) == 12 for sequence in (last, *others))


def test_no_more_sequences_than_places():
    world = World(max_num_seqs=3)
    for _ in range(10):
        world.add(2, max_tokens=3)
    assert len(world.step()) == 3
    assert world.scheduler.num_waiting == 7
    world.run()


def test_prefill_stops_at_the_last_contiguous_image_row():
    world = World(budget=64)
    sequence = world.add(30, image=(6, 20))
    assert world.step() == {0: 6}
    assert world.step() == {}
    assert world.scheduler.num_waiting_for_features == 1
    world.deliver(sequence, 11)
    assert world.step() == {0: 11}
    world.deliver(sequence, 20)
    assert world.step() == {0: 13}
    assert sequence.output_token_ids == [7]


def test_a_video_is_prefilled_frame_by_frame_as_its_rows_come():
    world = World(budget=64)
    video = world.add_video(3, 5)
    assert world.step() == {0: 2}
    world.deliver(video, 3)
    assert world.step() == {0: 3}
    world.deliver(video, 5)
    assert world.step() == {0: 2 + 2}  # the rest of a frame, and the text before the next
    world.deliver(video, 11)
    assert world.step() == {0: 5 + 2 + 1}
    assert world.step() == {}
    assert world.scheduler.num_waiting_for_features == 1
    world.deliver(video, 15)
    assert world.step() == {0: 4 + 3}
    world.run()


def test_tokens_that_were_prepared_for_a_sequence_are_not_reused_from_others():
    world = World(budget=64)
    first = world.add(9, request=1, max_tokens=1)
    world.step()
    assert first.num_cached_tokens == 0
    again = world.add(13, request=1, max_tokens=1)
    again.prelude = Sequence(9, bytes(16), [1], SamplingParams(max_tokens=1))
    again.prelude.num_reached_tokens = 4
    world.step()
    assert again.num_cached_tokens == world.scheduler.num_prefix_hits == 8 - 4


def test_an_image_at_the_very_beginning_waits_outside():
    world = World()
    sequence = world.add(9, image=(0, 8))
    assert world.step() == {}
    assert world.scheduler.num_waiting == 1
    world.deliver(sequence, 8)
    assert world.step() == {0: 9}


def test_waiting_for_features_does_not_hold_up_others():
    world = World(max_num_seqs=4, budget=32, num_blocks=64)
    for _ in range(6):
        world.add(12, image=(2, 8))
    texts = [world.add(4, max_tokens=2) for _ in range(6)]
    for _ in range(8):
        world.step()
    assert all(text.status is SequenceStatus.FINISHED for text in texts)


def test_text_and_images_take_turns_at_the_budget():
    world = World(budget=8, num_blocks=512)
    for _ in range(4):
        world.deliver(world.add(64, image=(2, 60)), 60)
    text = world.add(8, max_tokens=1)
    for _ in range(2):
        world.step()
    assert text.status is SequenceStatus.FINISHED


def test_a_stream_of_text_does_not_starve_images():
    world = World(budget=8, num_blocks=512)
    image = world.add(64, image=(2, 60), max_tokens=1)
    world.deliver(image, 60)
    for _ in range(20):
        world.add(8, max_tokens=1)
        world.step()
    assert image.status is SequenceStatus.FINISHED


def test_sequences_stalled_on_features_give_up_blocks_to_those_that_can_run():
    world = World(num_blocks=6, max_num_seqs=4, budget=32, caching=False)
    image = world.add(24, image=(20, 2), max_tokens=1)
    world.step()
    assert len(image.block_table) == 5
    text = world.add(8, max_tokens=6)
    world.step()
    world.step()
    assert image.num_preemptions == 1
    assert text.output_token_ids
    world.deliver(image, 2)
    world.run()
    assert image.status is SequenceStatus.FINISHED


def test_the_youngest_yields_and_everybody_finishes():
    world = World(num_blocks=6, block_size=4, caching=False)
    sequences = [world.add(8, max_tokens=12) for _ in range(3)]
    world.run()
    assert all(len(sequence.output_token_ids) == 12 for sequence in sequences)
    assert sequences[0].num_preemptions == 0
    assert world.scheduler.num_preemptions > 0
    assert world.blocks.num_free_blocks == 6


def test_prompts_that_block_each_other_are_resolved():
    world = World(num_blocks=8, block_size=4, budget=8, caching=False)
    sequences = [world.add(28, max_tokens=2), world.add(28, image=(0, 20), max_tokens=2)]
    world.deliver(sequences[1], 20)
    world.run()
    assert all(sequence.status is SequenceStatus.FINISHED for sequence in sequences)


def test_choices_of_one_request_compute_their_prompt_once():
    world = World(budget=64)
    choices = [world.add(17, request=5) for _ in range(4)]
    assert world.step() == {0: 17}
    assert world.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    assert [choice.num_cached_tokens for choice in choices] == [0, 16, 16, 16]
    world.run()
    assert world.scheduler.num_prefix_hits == 48


def test_a_preempted_sequence_finds_its_own_prefix_again():
    world = World(num_blocks=7, block_size=4, budget=32)
    sequences = [world.add(8, max_tokens=10) for _ in range(3)]
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert all(len(sequence.output_token_ids) == 10 for sequence in sequences)


def test_an_aborted_sequence_leaves_nothing_wherever_it_is():
    world = World(max_num_seqs=1)
    running, waiting = world.add(9), world.add(9)
    world.step()
    assert world.blocks.num_free_blocks < 64
    world.scheduler.remove(waiting)
    world.scheduler.remove(running)
    assert world.blocks.num_free_blocks == 64
    assert not world.scheduler.has_work


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(-1, 1)), min_size=1, max_size=12),
    num_blocks=st.integers(13, 30),
    budget=st.integers(4, 32),
)
def test_any_load_that_fits_alone_finishes(loads, num_blocks, budget):
    world = World(num_blocks=num_blocks, block_size=4, max_num_seqs=4, budget=budget)
    sequences = [world.add(length, max_tokens=most, priority=priority) for length, most, priority in loads]
    world.run(max_steps=5000)
    assert [len(sequence.output_token_ids) for sequence in sequences] == [most for _, most, _ in loads]
    assert world.blocks.num_free_blocks == num_blocks


class Arrivals(RuleBasedStateMachine):
    """Arrivals, features, steps and aborts in any order: blocks are conserved and never have two strange owners."""

    @initialize(
        num_blocks=st.integers(10, 24), budget=st.integers(4, 24), places=st.integers(1, 4), caching=st.booleans()
    )
    def start(self, num_blocks, budget, places, caching):
        self.world = World(num_blocks=num_blocks, max_num_seqs=places, budget=budget, caching=caching)
        self.live = []

    @rule(
        num_tokens=st.integers(1, 30),
        max_tokens=st.integers(1, 8),
        request=st.integers(0, 3),
        priority=st.integers(-1, 1),
    )
    def text_arrives(self, num_tokens, max_tokens, request, priority):
        self.live.append(self.world.add(num_tokens, max_tokens=max_tokens, request=request, priority=priority))

    @rule(num_rows=st.integers(1, 20), before=st.integers(0, 5), request=st.integers(4, 6), priority=st.integers(-1, 1))
    def image_arrives(self, num_rows, before, request, priority):
        image = (before, num_rows)
        self.live.append(self.world.add(before + num_rows + 3, image=image, request=request, priority=priority))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 100), num_rows=st.integers(0, 20))
    def features_arrive(self, index, num_rows):
        sequence = self.live[index % len(self.live)]
        ready = self.world.readiness.rows
        ready[sequence.request_id, 0] = max(ready[sequence.request_id, 0], num_rows)

    @rule(text_tokens=st.none() | st.integers(1, 20), image_tokens=st.none() | st.integers(1, 20))
    def step(self, text_tokens, image_tokens):
        self.world.step(PrefillLimits(text_tokens, image_tokens))
        self.live = [sequence for sequence in self.live if sequence.status is not SequenceStatus.FINISHED]

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 100))
    def abort(self, index):
        self.world.scheduler.remove(self.live.pop(index % len(self.live)))

    @invariant()
    def blocks_are_conserved(self):
        blocks = self.world.blocks
        owners = Counter(block for sequence in self.live for block in sequence.block_table)
        assert blocks.num_free_blocks + len(owners) == blocks.num_blocks
        for block, count in owners.items():
            assert blocks._ref_counts[block] == count
            # Shared blocks hold the same tokens for all their owners.
            users = [sequence for sequence in self.live if block in sequence.block_table]
            assert len({_content(sequence, block, blocks.block_size) for sequence in users}) == 1

    @invariant()
    def the_line_is_in_order(self):
        priorities = [sequence.priority for sequence in self.world.scheduler.running]
        assert priorities == sorted(priorities)

    @invariant()
    def waiting_sequences_hold_nothing(self):
        assert all(not s.block_table for s in self.live if s.status is SequenceStatus.WAITING)

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for sequence in self.live:
            self.world.deliver(sequence, 20)
        self.world.run(max_steps=5000)
        assert self.world.blocks.num_free_blocks == self.world.blocks.num_blocks


def _content(sequence, block, block_size):
    index = sequence.block_table.index(block)
    return index, tuple(sequence.token_ids[: (index + 1) * block_size])


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArrivals = Arrivals.TestCase
