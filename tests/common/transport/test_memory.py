"""Memory for payloads: the same again when its last user has let go, never while anybody still looks at it."""

import gc
import threading

import numpy as np
import pytest
import torch

from common.transport.memory import WarmMemory

MIB = 2**20


def take(pool: WarmMemory, num_bytes: int) -> memoryview:
    memory = pool.take(num_bytes)
    assert memory is not None
    return memory


def address(memory) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def test_what_was_let_go_is_lent_again():
    pool = WarmMemory(8 * MIB)
    first = take(pool, 3 * MIB)
    where = address(first)
    first[:] = b"x" * len(first)
    assert pool.idle_bytes == 0
    del first
    assert pool.idle_bytes == 3 * MIB
    again = take(pool, 3 * MIB)
    assert (address(again), len(again), pool.idle_bytes) == (where, 3 * MIB, 0)


def test_it_comes_back_only_after_every_view_and_tensor_of_it_is_gone():
    pool = WarmMemory(8 * MIB)
    rows = torch.frombuffer(take(pool, 2 * MIB), dtype=torch.bfloat16).view(-1, 64)
    tile = rows.split(256)[1]
    view = tile.view(torch.uint8).numpy().data
    del rows
    assert pool.idle_bytes == 0
    del tile
    assert pool.idle_bytes == 0
    del view
    assert pool.idle_bytes == 2 * MIB


def test_a_block_serves_what_is_a_little_smaller_and_the_closest_one_is_taken():
    pool = WarmMemory(16 * MIB)
    blocks = [take(pool, size) for size in (1_000_000, 1_200_000, 5_000_000)]
    where = [address(block) for block in blocks]
    del blocks
    assert address(take(pool, 990_000)) == where[0]
    small, large = take(pool, 990_000), take(pool, 990_000)
    assert [address(small), address(large)] == where[:2]
    assert len(small) == len(large) == 990_000
    assert address(take(pool, 2_000_000)) not in where  # five megabytes for two would be wasted


def test_no_more_is_kept_than_was_allowed_and_the_longest_idle_goes_first():
    pool = WarmMemory(3 * MIB)
    blocks = [take(pool, MIB) for _ in range(6)]
    where = [address(block) for block in blocks]
    for _ in range(6):
        del blocks[0]
    assert pool.idle_bytes == 3 * MIB
    assert {address(block) for block in [take(pool, MIB) for _ in range(3)]} == set(where[3:])


def test_where_no_map_is_to_be_had_there_is_no_memory_of_ours():
    assert WarmMemory(MIB).take(2**60) is None


def test_a_closed_pool_keeps_nothing_and_takes_nothing_from_its_users():
    pool = WarmMemory(8 * MIB)
    lent, idle = take(pool, MIB), take(pool, MIB)
    del idle
    pool.close()
    assert pool.idle_bytes == 0
    lent[:4] = b"here"
    assert bytes(lent[:4]) == b"here"
    del lent
    assert pool.idle_bytes == 0


@pytest.mark.parametrize("num_threads", [4])
def test_blocks_come_back_from_any_thread(num_threads: int):
    """Two users of one block would see the other's mark."""
    pool = WarmMemory(2 * MIB)
    lent: list[list[memoryview]] = [[] for _ in range(num_threads)]
    wrong: list[int] = []
    is_over = threading.Event()

    def let_go(mine: list[memoryview], mark: int) -> None:
        while not is_over.is_set() or mine:
            if mine:
                block = mine.pop()
                if set(bytes(block[:64])) != {mark}:
                    wrong.append(mark)
                del block

    threads = [threading.Thread(target=let_go, args=(lent[n], n + 1)) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    for number in range(2_000):
        block = take(pool, 128 * 1024 + number % 7 * 4096)
        mark = number % num_threads
        block[:64] = bytes([mark + 1]) * 64
        lent[mark].append(block)
        del block
    is_over.set()
    for thread in threads:
        thread.join()
    gc.collect()
    assert wrong == []
    assert 0 < pool.idle_bytes <= 2 * MIB
