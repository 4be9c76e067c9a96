"""A failing batch costs its images and never the thread; a dead thread is noticed by everyone who waits for it."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from common.service import metrics
from common.service.errors import InternalError, Overloaded, Unavailable
from vision_server.batcher import Batcher
from vision_server.compute import ComputeThread
from vision_server.device_jobs import EncodedGroup
from vision_server.encoder import Kind
from vision_server.host_link import Done

POISON = 255


class FakeEncoder:
    """Features of a tile are its first pixel. Fails as told; ``gate`` holds a batch back until it is set."""

    depth = 1

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.fail: Callable[[np.ndarray], None] = lambda tiles: None
        self.num_releases = 0

    def launch(self, kind: Kind, parts: Sequence[np.ndarray]) -> Done[list[torch.Tensor]]:
        self.started.set()
        assert self.gate.wait(30)
        numbers = np.concatenate(parts)[:, 0, 0, 0]
        self.batches.append(numbers.tolist())
        self.fail(numbers)
        values = torch.from_numpy(numbers.astype(np.float32))[:, None, None].expand(-1, 4, 2)
        return Done(list(torch.split(values, [len(part) for part in parts])))

    def release_memory(self) -> None:
        self.num_releases += 1


def tiles_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)


def poison_fails(numbers: np.ndarray) -> None:
    if POISON in numbers:
        raise RuntimeError("at 0x7f00 the device does not like this")


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
async def compute(encoder):
    thread = ComputeThread(encoder, Batcher(4, 20))
    thread.start()
    yield thread
    encoder.gate.set()
    assert await thread.stop(30)


async def encode(compute: ComputeThread, *numbers: int, dtype: torch.dtype = torch.float32) -> list[EncodedGroup]:
    image = compute.admit()
    compute.resize(image, len(numbers))
    try:
        async with asyncio.timeout(30):
            groups = compute.encode(image, tiles_of(*numbers), dtype)
            return [group async for group in groups if isinstance(group, EncodedGroup)]
    finally:
        compute.release(image)


def values(groups: list[EncodedGroup]) -> list[float]:
    return [value for group in groups for value in group.features[::4, 0].tolist()]


async def hold_first_batch(compute: ComputeThread, encoder: FakeEncoder) -> asyncio.Task[list[EncodedGroup]]:
    """Something is on the device, and stays there until the gate opens: what comes now waits in the queue."""
    encoder.gate.clear()
    encoder.started.clear()
    task = asyncio.create_task(encode(compute, 1))
    await asyncio.to_thread(encoder.started.wait, 30)
    return task


async def test_every_image_gets_its_own_tiles(compute, encoder):
    first = await hold_first_batch(compute, encoder)
    others = [asyncio.create_task(encode(compute, *range(10 * n, 10 * n + n))) for n in range(2, 6)]
    await asyncio.sleep(0)
    encoder.gate.set()
    assert values(await first) == [1]
    for n, task in enumerate(others, start=2):
        groups = await task
        assert values(groups) == list(range(10 * n, 10 * n + n))
        ends = itertools.accumulate(group.num_tiles for group in groups)
        assert [group.first_tile + group.num_tiles for group in groups] == list(ends)
    assert [len(batch) for batch in encoder.batches] == [1, 4, 4, 4, 2]


async def test_features_come_in_the_dtype_asked_for(compute):
    (group,) = await encode(compute, 3, dtype=torch.bfloat16)
    assert group.features.dtype == torch.bfloat16


async def test_one_poisonous_image_does_not_harm_its_neighbours(compute, encoder):
    encoder.fail = poison_fails
    first = await hold_first_batch(compute, encoder)
    good, bad, other = (asyncio.create_task(encode(compute, number)) for number in (2, POISON, 3))
    await asyncio.sleep(0)
    encoder.gate.set()
    assert [values(await task) for task in (first, good, other)] == [[1], [2], [3]]
    with pytest.raises(InternalError) as failure:
        await bad
    assert "0x" not in failure.value.message
    assert values(await encode(compute, 4)) == [4]


def num_out_of_memory() -> float:
    (family,) = metrics.OUT_OF_MEMORY.collect()
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


async def test_out_of_memory_is_tried_again_tile_by_tile(compute, encoder):
    def only_one_fits(numbers: np.ndarray) -> None:
        if len(numbers) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.fail = only_one_fits
    num_before = num_out_of_memory()
    assert values(await encode(compute, 5, 6, 7)) == [5, 6, 7]
    assert num_out_of_memory() == num_before + 1
    assert [len(batch) for batch in encoder.batches] == [3, 1, 1, 1]
    assert encoder.num_releases == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
async def test_memory_that_suffices_for_no_tile_is_overload(compute, encoder, error):
    def fail(numbers: np.ndarray) -> None:
        raise error

    encoder.fail = fail
    with pytest.raises(Overloaded):
        await encode(compute, 5, 6)
    encoder.fail = lambda numbers: None
    assert values(await encode(compute, 8)) == [8]


async def test_features_that_are_not_numbers_do_not_leave(compute, encoder, monkeypatch):
    def nan(kind: Kind, parts: Sequence[np.ndarray]) -> Done[list[torch.Tensor]]:
        return Done([torch.full((len(part), 4, 2), torch.nan) for part in parts])

    monkeypatch.setattr(encoder, "launch", nan)
    with pytest.raises(InternalError, match="finite"):
        await encode(compute, 5)


async def test_cancelled_tiles_are_never_encoded(compute, encoder):
    first = await hold_first_batch(compute, encoder)
    doomed = asyncio.create_task(encode(compute, *range(100, 113)))
    await asyncio.sleep(0)
    assert compute.queued_tiles == 13
    doomed.cancel()
    await asyncio.wait([doomed])
    assert compute.queued_tiles == compute.num_waiting == 0
    encoder.gate.set()
    await first
    assert values(await encode(compute, 2)) == [2]
    assert encoder.batches == [[1], [2]]


async def test_an_image_cancelled_while_on_the_device_is_forgotten(compute, encoder):
    first = await hold_first_batch(compute, encoder)
    first.cancel()
    await asyncio.wait([first])
    encoder.gate.set()
    assert values(await encode(compute, 2)) == [2]


async def test_a_full_queue_refuses(compute, encoder):
    first = await hold_first_batch(compute, encoder)
    waiting = asyncio.create_task(encode(compute, *range(19)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        compute.admit()
    encoder.gate.set()
    await asyncio.gather(first, waiting)
    assert values(await encode(compute, 9)) == [9]


async def test_a_dead_thread_fails_all_who_wait_and_all_who_come(encoder):
    """A broken device context cannot be repaired from inside: the owner sees ``ended`` and ends the process."""

    def fail(numbers: np.ndarray) -> None:
        raise torch.AcceleratorError("device-side assert")

    encoder.fail = fail
    compute = ComputeThread(encoder, Batcher(4, 20))
    compute.start()
    with pytest.raises(Unavailable):
        await encode(compute, 1)
    await asyncio.wait([compute.ended])
    assert isinstance(compute.ended.exception(), torch.AcceleratorError)
    with pytest.raises(Unavailable):
        await encode(compute, 2)
    assert await compute.stop(30)


async def test_an_idle_thread_shows_signs_of_life(encoder):
    beat = threading.Event()
    compute = ComputeThread(encoder, Batcher(4, 20), on_progress=beat.set)
    compute.start()
    assert await asyncio.to_thread(beat.wait, 30)
    assert await compute.stop(30)
    assert compute.ended.done() and compute.ended.exception() is None


async def test_stopping_does_not_wait_for_a_stuck_device(compute, encoder):
    stuck = await hold_first_batch(compute, encoder)
    assert not await compute.stop(0.01)
    encoder.gate.set()
    assert await compute.stop(30)
    await stuck


async def test_load_is_measured(compute):
    assert compute.tiles_per_second == 0
    await encode(compute, 1, 2, 3)
    assert compute.tiles_per_second > 0
    assert await compute.stop(30)
    assert compute.queued_tiles == compute.running_tiles == compute.num_running == 0
