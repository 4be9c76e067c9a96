"""What is held stays, whoever needs blocks; and it keeps nobody from ending."""

import itertools
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from language_server.image_spans import ImageSpan, ImageSpans
from language_server.sequence import SamplingParams, Sequence, SequenceStatus
from tests.language_server.test_scheduler import World

_numbers = itertools.count()


class HoldingWorld(World):
    """Also has prompts with an image that was there before: equal ``picture`` means equal prompt."""

    def make(self, picture, *, max_tokens=4, holder=None, text=3):
        before, num_rows = picture % 3, 4 + picture % 7
        prompt = [picture * 100 + token for token in range(before + num_rows + text)]
        seq_id = self.num_added
        self.num_added += 1
        return Sequence(
            seq_id,
            f"r{next(_numbers)}".encode() if holder is None else holder.request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens),
            ImageSpans([ImageSpan(0, before, num_rows, bytes([picture]))]),
            holder=holder,
        )

    def add_picture(self, picture, **options):
        sequence = self.make(picture, **options)
        self.deliver(sequence, 100)
        self.scheduler.add(sequence)
        return sequence

    def hold(self, picture, **options):
        """The holder, and how many tokens it holds."""
        holder = self.make(picture, **options)
        return holder, self.scheduler.hold(holder)

    def step(self, *args):
        """No chunk may have rows of an image that nobody will deliver."""
        schedule = self.scheduler.schedule

        def checked(limits):
            chunks = schedule(limits)
            for chunk in chunks:
                if (holder := chunk.sequence.holder) is not None:
                    assert chunk.start >= next(iter(chunk.sequence.image_spans)).end
                    assert chunk.sequence.block_table[: len(holder.block_table)] == holder.block_table
            return chunks

        with mock.patch.object(self.scheduler, "schedule", checked):
            return super().step(*args)

    @property
    def num_used_blocks(self):
        return self.blocks.num_blocks - self.blocks.num_free_blocks


def held_world(**options):
    world = HoldingWorld(**options)
    world.add_picture(4, max_tokens=1, text=9)  # an image at 1 to 9 of 18 tokens
    world.run()
    return world


def test_blocks_of_an_image_that_is_there_are_held_until_they_are_dropped():
    world = held_world()
    holder, num_tokens = world.hold(4, text=9)
    assert (num_tokens, len(holder.block_table), world.num_used_blocks) == (9, 3, 3)
    assert not world.scheduler.drop_hold(holder.seq_id + 1)
    assert world.scheduler.drop_hold(holder.seq_id)
    assert world.num_used_blocks == 0
    assert not world.scheduler.drop_hold(holder.seq_id)


def test_nothing_is_held_of_an_image_that_is_not_there_wholly():
    world = held_world()
    assert world.hold(5)[1] == 0
    assert world.hold(4, text=1)[1] == 0  # its last rows share a block with what is still to be computed
    assert world.num_used_blocks == 0


def test_a_sequence_finds_what_is_held_again_after_preemption():
    world = held_world(num_blocks=12, max_num_seqs=4)
    holder, _ = world.hold(4, text=9, max_tokens=6)
    sequence = world.add_picture(4, text=9, max_tokens=6, holder=holder)
    world.step()
    world.scheduler._preempt(sequence)
    text = world.add(30, max_tokens=6)  # takes all other blocks
    for _ in range(40):
        world.step()
    assert {text.status, sequence.status} == {SequenceStatus.FINISHED}
    assert sequence.num_cached_tokens == 16 and world.num_used_blocks == 3


def test_what_was_registered_may_be_forgotten_while_it_is_held():
    world = held_world()
    holder, _ = world.hold(4, text=9)
    failed = world.add_picture(4, text=9, holder=holder)
    world.step()
    world.blocks.discard(failed)  # its numbers were none
    world.scheduler.remove(failed)
    other = world.add_picture(4, text=9, holder=holder)
    world.run()
    assert other.status is SequenceStatus.FINISHED
    assert world.hold(4, text=9)[1] == 0


def test_a_hold_that_would_keep_another_from_ending_is_not_granted():
    world = held_world(num_blocks=12)
    long = world.add(20, max_tokens=24)  # 11 blocks
    assert world.hold(4, text=9)[1] == 0
    assert world.num_used_blocks == 0
    world.scheduler.remove(long)
    assert world.hold(4, text=9, max_tokens=30)[1] == 9  # its own blocks do not count twice
    assert world.hold(4, text=9, max_tokens=30)[1] == 9  # nor do equal ones


def test_who_comes_later_and_does_not_fit_beside_a_hold_waits_and_nothing_new_is_held():
    world = held_world(num_blocks=12)
    world.add_picture(5, max_tokens=1, text=9)
    world.run()
    holder, _ = world.hold(4, text=9)
    long = world.add(20, max_tokens=24)
    short = world.add(5, max_tokens=2)
    for _ in range(3):
        world.step()
    assert (long.status, short.status) == (SequenceStatus.WAITING, SequenceStatus.FINISHED)
    assert world.hold(5, text=9)[1] == 0
    world.scheduler.drop_hold(holder.seq_id)
    world.run()
    assert long.status is SequenceStatus.FINISHED


class Holds(RuleBasedStateMachine):
    """Requests with images that come back, beside others, in little memory: all of them end."""

    @initialize(num_blocks=st.integers(12, 24), budget=st.integers(4, 24), places=st.integers(1, 4))
    def start(self, num_blocks, budget, places):
        self.world = HoldingWorld(num_blocks=num_blocks, max_num_seqs=places, budget=budget)
        self.live, self.held = [], {}  # sequences; the holders' sequences, None until they have come
        for picture in range(5):
            self.world.add_picture(picture, max_tokens=1, text=9)
        self.world.run()

    @rule(picture=st.integers(0, 5), max_tokens=st.integers(1, 24), text=st.integers(1, 9))
    def image_comes(self, picture, max_tokens, text):
        self.live.append(self.world.add_picture(picture, max_tokens=max_tokens, text=text))

    @rule(num_tokens=st.integers(1, 24), max_tokens=st.integers(1, 24))
    def text_comes(self, num_tokens, max_tokens):
        self.live.append(self.world.add(num_tokens, max_tokens=max_tokens))

    @rule(picture=st.integers(0, 4), max_tokens=st.integers(1, 28), text=st.integers(3, 9))
    def image_comes_back(self, picture, max_tokens, text):
        holder, num_tokens = self.world.hold(picture, max_tokens=max_tokens, text=text)
        if num_tokens:
            self.held[holder] = None, (picture, max_tokens, text)

    @precondition(lambda self: any(sequences is None for sequences, _ in self.held.values()))
    @rule(num_choices=st.integers(1, 2))
    def its_choices_come(self, num_choices):
        holder, (_, what) = next(item for item in self.held.items() if item[1][0] is None)
        self.bring(holder, what, num_choices)

    def bring(self, holder, what, num_choices):
        picture, max_tokens, text = what
        choices = [
            self.world.add_picture(picture, max_tokens=max_tokens, text=text, holder=holder) for _ in range(num_choices)
        ]
        self.held[holder] = choices, what
        self.live += choices

    @rule(num_steps=st.integers(1, 4))
    def steps(self, num_steps):
        for _ in range(num_steps):
            self.world.step()
        self.forget_the_finished()

    def forget_the_finished(self):
        self.live = [sequence for sequence in self.live if sequence.status is not SequenceStatus.FINISHED]
        for holder, (choices, _) in list(self.held.items()):
            if choices is not None and not set(choices) & set(self.live):
                assert self.world.scheduler.drop_hold(holder.seq_id)
                del self.held[holder]

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 100))
    def one_is_aborted(self, index):
        self.world.scheduler.remove(self.live.pop(index % len(self.live)))
        self.forget_the_finished()

    @invariant()
    def blocks_are_conserved(self):
        if not hasattr(self, "world"):
            return
        owned = {block for sequence in (*self.live, *self.held) for block in sequence.block_table}
        assert self.world.num_used_blocks == len(owned)

    @invariant()
    def everybody_who_holds_could_end_alone(self):
        if not hasattr(self, "world"):
            return
        blocks = self.world.blocks
        for holder in self.held:
            others = {block for other in self.held for block in other.block_table} - set(holder.block_table)
            assert blocks.blocks_needed(holder.max_num_tokens) + len(others) <= blocks.num_blocks

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for holder, (choices, what) in list(self.held.items()):
            if choices is None:
                self.bring(holder, what, 1)
        for _ in range(5000):
            if not self.live:
                break
            self.world.step()
            self.forget_the_finished()
        assert not self.live and not self.held
        assert self.world.num_used_blocks == 0


Holds.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestHolds = Holds.TestCase
