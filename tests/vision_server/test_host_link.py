"""Copies and arithmetic overlap where they may and nowhere else, on streams that check what CUDA leaves to luck."""

import numpy as np
import pytest
import torch

from common.model.config import load_config
from common.model.graphs import Repeat
from tests.checkpoints import VISION_300M, make_checkpoint
from tests.vision_server.streams import CheckedStreams, Clock
from vision_server.encoder import Seen, VisionEncoder
from vision_server.host_link import CudaLink, HostLink, Then

CPU = torch.device("cpu")


def tiles_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)


@pytest.fixture
def streams():
    with CheckedStreams() as streams:
        yield streams


@pytest.fixture
def link(streams) -> CudaLink:
    return CudaLink(CPU, streams=streams)


def launch(link: HostLink, *parts: np.ndarray):
    """A batch whose result is each tile's first pixel, plus 1."""
    with link.batches():
        uploaded = link.upload(parts)
        computed = uploaded[:, 0, 0, 0].float() + 1
        link.mark()
        return link.download(torch.split(computed, [len(part) for part in parts]))


def results(pending, streams=None):
    parts = pending.result()
    for part in parts:
        if streams is not None:
            streams.check_read_by_host(part)
    return [part.tolist() for part in parts]


def test_batches_overlap_in_order_and_find_their_own_tiles(link, streams):
    waiting = [launch(link, tiles_of(0), tiles_of(1, 2)), launch(link, tiles_of(1), tiles_of(2, 3))]
    for number in range(2, 20):
        assert results(waiting.pop(0), streams) == [[number - 1], [number, number + 1]]
        waiting.append(launch(link, tiles_of(number), tiles_of(number + 1, number + 2)))
    streams.check_memory()
    assert streams.faults == []


def test_a_copy_that_nobody_waits_for_is_found(link, streams, monkeypatch):
    monkeypatch.setattr(streams, "wait", lambda stream, event: None)
    launch(link, tiles_of(1))
    assert any("does not wait" in fault for fault in streams.faults)


def test_memory_that_is_not_kept_is_found(link, streams, monkeypatch):
    monkeypatch.setattr(streams, "keep", lambda tensor, stream: None)
    launch(link, tiles_of(1))
    streams.check_memory()
    assert any("not kept" in fault for fault in streams.faults)


def test_a_result_that_is_read_too_early_is_found(link, streams):
    pending = launch(link, tiles_of(1))
    streams.check_read_by_host(pending._hosts[0])
    assert streams.faults == ["the host reads what the device may still be writing"]


def test_pinned_memory_is_used_again_only_when_it_has_left(link, streams):
    """More batches than buffers, and nobody waits for a result in between."""
    pending = [launch(link, tiles_of(number)) for number in range(5)]
    assert [results(each) for each in pending] == [[[number + 1]] for number in range(5)]
    assert streams.faults == []


def test_pinned_memory_grows_with_the_batch(link, streams):
    for parts in ([tiles_of(1)], [tiles_of(2, 3), tiles_of(4)], [tiles_of(5)], [tiles_of(6)], [tiles_of(7, 8)]):
        assert results(launch(link, *parts)) == [(part[:, 0, 0, 0] + 1.0).tolist() for part in parts]


def test_each_part_has_memory_of_its_own(link):
    first, second = launch(link, tiles_of(1), tiles_of(2)).result()
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 4
    with HostLink(CPU).batches():
        first, second = launch(HostLink(CPU), tiles_of(1), tiles_of(2)).result()
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 4


def test_what_is_computed_aside_does_not_wait_for_a_batch(link, streams):
    with link.batches():
        kept = link.upload([tiles_of(1)]).float()
        pending = link.download([kept])
    pending.result()
    launch(link, tiles_of(2))
    before = Clock(streams.host)
    with link.aside([kept]):
        assert streams.current().priority < 0
        pending = link.download([kept * 2])
    pending.result()
    assert streams.host[link._aside.number] > before[link._aside.number]
    assert streams.host[link._batches.number] == before[link._batches.number]  # the second batch is not waited for
    assert streams.host[link._down.number] == before[link._down.number]
    streams.check_memory()
    assert streams.faults == []


@pytest.mark.parametrize("where", ["batches", "aside"])
def test_what_was_asked_for_before_is_over(link, streams, where):
    """Weights that are still being copied, say, or a clone of what is projected."""
    weights = torch.zeros(3) + 1
    with link.batches() if where == "batches" else link.aside([weights]):
        pending = link.download([weights * 2])
    assert results(pending, streams) == [[2, 2, 2]]
    assert streams.faults == []


def test_progress_is_told_as_the_device_passes_its_stations(streams):
    beats: list[None] = []
    link = CudaLink(CPU, lambda: beats.append(None), streams)
    with link.batches():
        computed = link.upload([tiles_of(1)]).float()
        for _ in range(3):
            computed = computed + 1
            link.mark()
        pending = link.download([computed])
    marks = streams.events[-5:-2]
    assert beats == [] and not pending.is_done()
    marks[0].has_happened = True
    assert not pending.is_done() and len(beats) == 1
    streams.events[-1].has_happened = marks[1].has_happened = True
    assert pending.is_done() and len(beats) == 2
    pending.result()
    assert len(beats) == 3


def test_on_a_cpu_progress_is_told_at_once():
    beats: list[None] = []
    link = HostLink(CPU, lambda: beats.append(None))
    pending = launch(link, tiles_of(7))
    assert len(beats) == 1 and pending.is_done() and link.depth == 1
    with link.aside([]):
        assert results(pending) == [[8]]


def test_what_is_made_of_a_result_is_done_when_that_is(link, streams):
    pending = Then(launch(link, tiles_of(1)), lambda parts: parts[0].item())
    assert not pending.is_done()
    for event in streams.events:
        event.has_happened = True
    assert pending.is_done() and pending.result() == 2


# --- the encoder on such a link


def make_encoder(path, link=None, **options) -> VisionEncoder:
    encoder = VisionEncoder(load_config(path), "cpu", "float32", **options)
    encoder.load(path)
    if link is not None:
        encoder._link = link
    return encoder


def random_tiles(num_tiles: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_tiles, 448, 448, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def flash_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("flash"), layout="github", vision=VISION_300M, flash=True)


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("kind", ["features", "states"])
def test_an_encoder_with_two_batches_under_way(checkpoint, streams, link, kind, has_graphs):
    encoder, plain = make_encoder(checkpoint.path, link), make_encoder(checkpoint.path)
    batches = [[random_tiles(1, 0), random_tiles(2, 1)], [random_tiles(2, 2)], [random_tiles(1, 3)]]
    expected = [plain.launch(kind, batch).result() for batch in batches]
    if has_graphs:
        encoder.capture_graphs(2, Repeat)
    streams.all_stays()
    waiting = [encoder.launch(kind, batch) for batch in batches[:2]]
    found = [waiting[0].result()]
    waiting.append(encoder.launch(kind, batches[2]))
    found += [pending.result() for pending in waiting[1:]]
    for batch, right in zip(found, expected, strict=True):
        for part, right_part in zip(batch, right, strict=True):
            streams.check_read_by_host(part)
            torch.testing.assert_close(part, right_part, atol=1e-5, rtol=0)
    streams.check_memory()
    assert streams.faults == []


@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_flash_encoder_projects_beside_the_next_batch(flash_checkpoint, streams, link, has_graphs):
    encoder, plain = make_encoder(flash_checkpoint.path, link), make_encoder(flash_checkpoint.path)
    if has_graphs:
        encoder.capture_graphs(2, Repeat)
    streams.all_stays()
    batch = [random_tiles(2, 0), random_tiles(1, 1)]
    pending = encoder.launch("patches", batch)
    following = encoder.launch("patches", [random_tiles(1, 2)])
    for part, tiles in zip(pending.result(), batch, strict=True):
        assert isinstance(part, Seen)
        (right,) = plain.launch("patches", [tiles]).result()
        assert isinstance(right, Seen)
        torch.testing.assert_close(part.scores, right.scores, atol=1e-5, rtol=0)
        compressed = [False, True][: len(tiles)]
        before = Clock(streams.host)
        projected = encoder.project(list(part.patches), compressed).result()
        assert streams.host[link._batches.number] == before[link._batches.number]
        expected = plain.project(list(right.patches), compressed).result()
        assert projected.tokens_per_tile == expected.tokens_per_tile
        torch.testing.assert_close(projected.rows, expected.rows, atol=1e-5, rtol=0)
        streams.check_read_by_host(projected.rows)
    following.result()
    streams.check_memory()
    assert streams.faults == []
