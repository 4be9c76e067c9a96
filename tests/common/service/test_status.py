"""A router hears from a worker at once, at every change of state, and otherwise at least once a second."""

import asyncio
import threading
import time
from contextlib import aclosing

from common.service.status import StatusBoard
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WORKER_STATE_STARTING, ModelInfo, VisionLoad


def board(**load) -> StatusBoard:
    return StatusBoard("v0", bytes(16), ModelInfo(model="m"), lambda: VisionLoad(**load), "127.0.0.1:9")


async def test_the_first_message_comes_at_once_and_says_everything():
    async with aclosing(board(queued_tiles=3).watch()) as stream:
        status = await asyncio.wait_for(anext(stream), 5)
    assert (status.name, status.state, status.model.model) == ("v0", WORKER_STATE_STARTING, "m")
    assert (status.vision.queued_tiles, status.metrics_address) == (3, "127.0.0.1:9")
    assert len(status.incarnation) == 16


async def test_every_stream_hears_a_change_of_state():
    shared = board()
    async with aclosing(shared.watch()) as first, aclosing(shared.watch()) as second:
        await anext(first)
        await anext(second)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in (first, second)]
        await asyncio.sleep(0)
        shared.state = WORKER_STATE_READY
        assert [(await asyncio.wait_for(heard, 5)).state for heard in waiting] == [WORKER_STATE_READY] * 2


async def test_messages_keep_coming_and_show_progress():
    shared = board()
    async with aclosing(shared.watch()) as stream:
        await anext(stream)
        shared.bump()
        assert (await asyncio.wait_for(anext(stream), 10)).progress == 1


def test_a_thread_that_computes_makes_progress_and_one_that_sleeps_does_not():
    shared = board()
    stage = threading.Barrier(2)

    def work() -> None:
        stage.wait()
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        stage.wait()
        stage.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert thread.ident is not None
    shared.count_cpu_time(thread.ident)
    stage.wait()
    stage.wait()
    computed = shared.snapshot().progress
    assert computed >= 10
    assert shared.snapshot().progress == computed
    stage.wait()
    thread.join()
    assert shared.snapshot().progress == computed


async def test_a_restarted_worker_is_another_worker():
    assert board().snapshot().incarnation != board().snapshot().incarnation


async def test_a_change_that_comes_between_two_messages_is_not_lost():
    shared = board()
    async with aclosing(shared.watch()) as stream:
        await anext(stream)
        shared.state = WORKER_STATE_DRAINING
        assert (await asyncio.wait_for(anext(stream), 5)).state == WORKER_STATE_DRAINING
