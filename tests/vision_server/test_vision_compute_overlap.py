"""Two batches under way: everyone gets their own, in order, whatever ends, fails, leaves or comes meanwhile."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from common.service.errors import InternalError, Unavailable
from vision_server.batcher import Batcher
from vision_server.compute import ComputeThread
from vision_server.device_jobs import EncodedGroup, SeenGroup
from vision_server.encoder import Kind, Projected, Seen

PATIENCE = 30
SOON = 0.05  # seconds in which nothing must happen


class Held:
    """A batch, or projections, that are done when the test says so."""

    def __init__(self, numbers: list[int], make: Callable[[], object]) -> None:
        self.numbers = numbers
        self._make = make
        self._released = threading.Event()
        self._error: Exception | None = None

    def release(self, error: Exception | None = None) -> None:
        self._error = error
        self._released.set()

    def is_done(self) -> bool:
        return self._released.is_set()

    def result(self):
        assert self._released.wait(PATIENCE)
        if self._error is not None:
            raise self._error
        return self._make()


class HeldEncoder:
    """Features of a tile are its first pixel. ``held``: what was launched, in order."""

    depth = 2

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.refuse: Exception | None = None  # to launch more than one tile behind another batch
        self.is_open = False
        self._changed = threading.Condition()

    def launch(self, kind: Kind, parts: Sequence[np.ndarray]) -> Held:
        numbers = [part[:, 0, 0, 0] for part in parts]
        if self.refuse is not None and self.held and sum(map(len, numbers)) > 1:
            raise self.refuse
        rows = [torch.from_numpy(part.astype(np.float32))[:, None, None].expand(-1, 4, 2) for part in numbers]
        seen = [Seen(part, part[:, 0, 0]) for part in rows]
        return self._hold(np.concatenate(numbers).tolist(), lambda: seen if kind == "patches" else rows)

    def project(self, patches: Sequence[torch.Tensor], compressed: Sequence[bool]) -> Held:
        numbers = [-int(patch[0, 0]) for patch in patches]
        return self._hold(numbers, lambda: Projected(torch.cat(list(patches)), (4,) * len(patches)))

    def release_memory(self) -> None:
        pass

    def open(self) -> None:
        """From now on, everything is done at once."""
        with self._changed:
            self.is_open = True
            for held in self.held:
                held.release()

    async def nth(self, index: int) -> Held:
        """Waits until that many are launched."""

        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.held) > index, PATIENCE)

        await asyncio.to_thread(wait)
        return self.held[index]

    @property
    def launched(self) -> list[list[int]]:
        return [held.numbers for held in self.held]

    def _hold(self, numbers: list[int], make: Callable[[], object]) -> Held:
        with self._changed:
            held = Held(numbers, make)
            if self.is_open:
                held.release()
            self.held.append(held)
            self._changed.notify_all()
            return held


@pytest.fixture
def encoder() -> HeldEncoder:
    return HeldEncoder()


@pytest.fixture
async def compute(encoder):
    thread = ComputeThread(encoder, Batcher(2, 20))
    thread.start()
    yield thread
    encoder.open()
    assert await thread.stop(PATIENCE)


class Image:
    """On its way through ``compute``: a tile for each number."""

    def __init__(self, compute: ComputeThread, *numbers: int, kind: Kind = "features") -> None:
        self._compute = compute
        self._image = compute.admit()
        compute.resize(self._image, len(numbers))
        self._tiles = np.array(numbers, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        self.groups: list[EncodedGroup | SeenGroup] = []
        self.task = asyncio.create_task(self._run(kind))

    async def _run(self, kind: Kind) -> list[float]:
        try:
            async with asyncio.timeout(PATIENCE):
                async for group in self._compute.encode(self._image, self._tiles, torch.float32, kind):
                    self.groups.append(group)
        finally:
            self._compute.release(self._image)
        return [float(row) for group in self.groups for row in self._rows(group)[:, 0]]

    def _rows(self, group: EncodedGroup | SeenGroup) -> torch.Tensor:
        return group.features[::4] if isinstance(group, EncodedGroup) else group.seen.patches[:, 0]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def test_two_batches_are_under_way_and_the_third_waits(compute, encoder):
    image = Image(compute, 1, 2, 3, 4, 5, 6)
    await encoder.nth(1)
    await asyncio.sleep(SOON)
    assert encoder.launched == [[1, 2], [3, 4]]
    assert compute.running_tiles == 4 and compute.queued_tiles == 2
    encoder.held[0].release()
    await encoder.nth(2)
    assert compute.running_tiles == 4 and compute.queued_tiles == 0
    assert [group.first_tile for group in image.groups] == [0]
    encoder.open()
    assert await image.task == [1, 2, 3, 4, 5, 6]
    assert [group.first_tile for group in image.groups] == [0, 2, 4]


async def test_who_comes_while_a_batch_is_computed_is_launched_at_once(compute, encoder):
    """Or the device would wait for the next upload at the end of each batch that found the queue empty."""
    first = Image(compute, 1)
    await encoder.nth(0)
    await asyncio.sleep(SOON)  # the thread has nothing else to do than wait for it
    second = Image(compute, 2)
    assert (await encoder.nth(1)).numbers == [2]
    assert not first.task.done()
    encoder.held[0].release()
    assert await first.task == [1]
    encoder.held[1].release()
    assert await second.task == [2]


async def test_a_batch_that_is_done_early_waits_for_the_one_before(compute, encoder):
    first, second = Image(compute, 1, 2), Image(compute, 3, 4)
    await encoder.nth(1)
    encoder.held[1].release()
    await asyncio.sleep(SOON)
    assert not second.task.done()
    encoder.held[0].release()
    assert await first.task == [1, 2]
    assert await second.task == [3, 4]


async def test_an_image_that_leaves_while_launched_takes_nobody_with_it(compute, encoder):
    leaving, staying, later = Image(compute, 1), Image(compute, 2), Image(compute, 3, 4)
    await encoder.nth(1)
    await leaving.leave()
    encoder.open()
    assert await staying.task == [2]
    assert await later.task == [3, 4]
    assert compute.queued_tiles == compute.num_running == 0


async def test_an_image_that_leaves_between_its_batches_is_not_launched_again(compute, encoder):
    leaving, staying = Image(compute, 1, 2, 3, 4, 5, 6), Image(compute, 7)
    await encoder.nth(1)
    await leaving.leave()
    encoder.open()
    assert await staying.task == [7]
    assert encoder.launched == [[1, 2], [3, 4], [7]]


async def test_the_first_of_two_batches_fails_and_is_tried_again_apart(compute, encoder):
    first, second, third = Image(compute, 1), Image(compute, 2), Image(compute, 3, 4)
    await encoder.nth(1)
    encoder.held[0].release(RuntimeError("the device does not like this"))
    (await encoder.nth(2)).release(RuntimeError("nor this"))
    (await encoder.nth(3)).release()
    with pytest.raises(InternalError):
        await first.task
    assert await second.task == [2]
    encoder.held[1].release()
    assert await third.task == [3, 4]
    assert encoder.launched == [[1, 2], [3, 4], [1], [2]]


async def test_an_image_that_failed_in_its_first_batch_gets_nothing_of_the_second(compute, encoder):
    image = Image(compute, 1, 2, 3, 4)
    await encoder.nth(1)
    encoder.held[0].release(RuntimeError("no"))
    with pytest.raises(InternalError):
        await image.task
    encoder.held[1].release()
    other = Image(compute, 9)
    (await encoder.nth(2)).release()
    assert await other.task == [9] and image.groups == []


async def test_a_batch_that_does_not_fit_beside_another_keeps_the_order(compute, encoder):
    """Its pieces are tried again only when what was launched before has been handed out."""
    encoder.refuse = torch.OutOfMemoryError("full")
    image = Image(compute, 1, 2, 3, 4)
    await encoder.nth(0)
    await asyncio.sleep(SOON)
    encoder.open()
    assert await image.task == [1, 2, 3, 4]
    assert encoder.launched == [[1, 2], [3], [4]]


async def test_stopping_ends_with_the_batch_that_is_waited_for(compute, encoder):
    first, second = Image(compute, 1, 2), Image(compute, 3, 4)
    await encoder.nth(1)
    assert not await compute.stop(0.01)
    encoder.held[0].release()
    assert await first.task == [1, 2]
    assert await compute.stop(PATIENCE)
    with pytest.raises(Unavailable):
        await second.task
    assert compute.ended.exception() is None


async def test_stopping_while_the_only_batch_is_computed(compute, encoder):
    image = Image(compute, 1)
    await encoder.nth(0)
    await asyncio.sleep(SOON)
    assert not await compute.stop(0.01)
    encoder.held[0].release()
    assert await compute.stop(PATIENCE)
    assert await image.task == [1]


async def test_projections_wait_for_no_batch(compute, encoder):
    seen = Image(compute, 1, 2, kind="patches")
    (await encoder.nth(0)).release()
    assert await seen.task == [1, 2]
    others = [Image(compute, number, number + 1) for number in (3, 5, 7)]
    await encoder.nth(2)
    await asyncio.sleep(SOON)  # the thread waits for the first of the two
    projecting = asyncio.create_task(compute.project(seen.groups, [False, True], torch.float32))
    (await encoder.nth(3)).release()
    assert (await projecting).features[::4, 0].tolist() == [1, 2]
    encoder.open()
    await asyncio.gather(*(image.task for image in others))
    assert encoder.launched == [[1, 2], [3, 4], [5, 6], [-1, -2], [7, 8]]


async def test_kinds_are_launched_apart_and_overlap(compute, encoder):
    features, seen = Image(compute, 1), Image(compute, 2, kind="patches")
    await encoder.nth(1)
    encoder.open()
    assert await features.task == [1] and await seen.task == [2]
    assert isinstance(seen.groups[0], SeenGroup)
    assert encoder.launched == [[1], [2]]
