"""Prompts whose length the encoder decides, and blocks other than one whole image, beside the plain language model."""

import asyncio
import dataclasses
import time

import pytest
import torch

from common.service import metrics
from common.service.errors import DeadlineExceeded, InvalidRequest, Unavailable
from protos.frame import FrameRejected
from protos.status_pb2 import WatchStatusRequest
from tests.checkpoints import make_checkpoint
from tests.flash import ABSOLUTE_THRESHOLD, RELATIVE_THRESHOLD
from tests.language_server.conftest import (
    Image,
    Reply,
    eventually,
    make_request,
    reference_tokens,
    running_system,
)
from tests.language_server.messages import message, video
from tests.language_server.test_language_server import failure, rest_of

SYSTEM_MESSAGE = "be brief"
HIDDEN = 56
LONG = "what number is written in the picture? " * 5


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    config = {"system_message": SYSTEM_MESSAGE}
    return make_checkpoint(tmp_path_factory.mktemp("flash") / "c", layout="github", flash=True, github_config=config)


@pytest.fixture
def start_flash(flash, tmp_path):
    return lambda **options: running_system(flash, tmp_path, **options)


@pytest.fixture
async def flash_system(start_flash):
    async with start_flash() as system:
        yield system
        await system.at_rest()


def draw(seed, *sizes, is_video=False):
    """Features as if a tile with 64 tokens had been compressed."""
    rows = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Image(rows, list(sizes), bytes([seed]) * 32, is_video=is_video)


PHOTO = draw(1, 256, 64, 64, 256)
ICON = draw(2, 64)
CLIP = draw(3, 64, 256, 64, 64, is_video=True)
WIDE = draw(4, 256, 256)


@torch.inference_mode()
def published_reply(checkpoint, messages, images, num_tokens=12):
    """Greedy ids by the published recipe: 256 placeholders for each tile, those that are too many deleted, the features
    put in the places of the others, positions without a gap."""
    text, tiles = "", []
    for each in [message("system", SYSTEM_MESSAGE), *messages]:
        text += f"<|im_start|>{each.role}\n"
        for part in each.parts:
            if part.WhichOneof("part") == "text":
                text += part.text
                continue
            placed = tiles_of(part, images)
            tiles += placed
            text += f"<img>{'<IMG_CONTEXT>' * 256 * len(placed)}</img>" + ("" if each.inline_images else "\n")
        text += "<|im_end|>\n"
    ids = torch.tensor(checkpoint.tokenizer(text + "<|im_start|>assistant\n")["input_ids"])
    is_placeholder = ids == checkpoint.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    kept = torch.cat([torch.arange(256) < len(tile) for tile in tiles])
    is_kept = torch.ones_like(is_placeholder).masked_scatter(is_placeholder, kept)
    embeds = checkpoint.reference().get_input_embeddings()(ids[is_kept]).clone()
    embeds[is_placeholder[is_kept]] = torch.cat(tiles)
    output = checkpoint.reference().generate(
        inputs_embeds=embeds.unsqueeze(0),
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return output[0].tolist()


def tiles_of(part, images):
    if part.WhichOneof("part") == "image_index":
        return list(images[part.image_index].tiles)
    tiles = []
    for piece in part.block.pieces:
        own = images[piece.image_index].tiles[piece.first_tile :]
        tiles += own[: piece.num_tiles or None]
    return tiles


def tokens_run():
    """In all steps of this process so far."""
    return metrics.LANGUAGE_STEP_TOKENS._sum.get()


# --- parity


CONVERSATIONS = {
    "two images": ([message("user", 0, 1, "describe the difference")], [PHOTO, ICON]),
    "a video": ([message("user", *video(0, 4), "how many shapes are there?")], [CLIP]),
    "combined images": ([message("user", [(0, 0, 0), (1, 0, 0)], "first image or second?")], [PHOTO, ICON]),
    "all at once": (
        [
            message("user", "look: ", 1, "and ", *video(0, 4), "what is it", inline_images=True),
            message("assistant", "a red square"),
            message("user", [(2, 0, 1), (3, 0, 1)], [(2, 1, 0)], "same number?"),
        ],
        [CLIP, PHOTO, WIDE, ICON],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_replies_equal_the_plain_language_model_on_spliced_embeddings(flash_system, flash, name):
    messages, images = CONVERSATIONS[name]
    reply = await flash_system.generate(make_request(messages, images), images)
    assert reply.ids() == published_reply(flash, messages, images)
    assert len(set(reply.ids())) > 3
    usage = reply.finished[0].usage
    assert usage.image_tokens == sum(len(image.features) for image in images if not image.is_video)
    assert usage.video_tokens == sum(len(image.features) for image in images if image.is_video)
    assert usage.saved_tokens == sum(image.num_tokens - len(image.features) for image in images)
    assert reply.admitted.num_prompt_tokens == usage.prompt_tokens + usage.saved_tokens
    assert usage.cached_tokens == 0


async def test_a_video_of_a_base_model_is_its_frames_as_images(system, checkpoint, images):
    clip = dataclasses.replace(images[1], is_video=True)
    frames = [
        Image(rows, [len(rows)], bytes(32), pixels.unsqueeze(0))
        for rows, pixels in zip(clip.tiles, clip.pixel_values, strict=True)
    ]
    reply = await system.generate(make_request([message("user", *video(0, 2), "what happens?")], [clip]), [clip])
    expected = [message("user", "Frame-1: ", 0, "Frame-2: ", 1, "what happens?")]
    assert reply.ids() == reference_tokens(checkpoint, expected, frames)
    usage = reply.finished[0].usage
    assert (usage.image_tokens, usage.video_tokens, usage.saved_tokens) == (0, 512, 0)


async def test_places_that_do_not_fit_the_tiles_are_refused(flash_system):
    request = make_request([message("user", *video(0, 3), "what?")], [CLIP])
    error = await failure(flash_system.generate(request))
    assert (type(error), error.code) == (InvalidRequest, "image_marker_mismatch")


async def test_a_video_in_pieces_of_frames_that_come_last_one_first(flash_system, flash):
    """Rows of the tiles that are here can be read only once those before them are."""
    messages = [message("user", *video(0, 4), "what?")]
    request = make_request(messages, [CLIP])
    call = flash_system.open(request)
    reply = Reply(admitted := (await call.read()).admitted)
    for tile in (3, 1, 0):
        await flash_system.deliver(request, admitted, [CLIP], 0, tiles=[tile])
    assert flash_system.server.features.num_awaited == 1
    await flash_system.deliver(request, admitted, [CLIP], 0, tiles=[2])
    for event in await rest_of(call):
        reply.add(event)
    assert reply.ids() == published_reply(flash, messages, [CLIP])


# --- what is here already


async def test_the_same_image_again_is_neither_encoded_nor_computed(flash_system, flash):
    messages = [message("user", 0, "describe the image")]
    first = await flash_system.generate(make_request(messages, [PHOTO]), [PHOTO])
    again = await flash_system.generate(make_request(messages, [PHOTO]))
    assert not again.admitted.missing
    assert again.ids() == first.ids() == published_reply(flash, messages, [PHOTO])
    assert first.finished[0].usage.cached_tokens == 0
    assert again.finished[0].usage.cached_tokens > len(PHOTO.features)
    for reply in (first, again):
        assert reply.finished[0].usage.saved_tokens == 2 * 192


async def test_an_image_that_is_encoded_otherwise_takes_no_kv_of_what_it_was(start_flash, flash):
    """Its features were dropped, its KV was not, all but the block in which another question begins; the second time
    another tile was near the threshold."""
    otherwise = draw(9, 64, 256, 256, 64)
    otherwise.mm_hash = PHOTO.mm_hash
    async with start_flash(feature_bytes=PHOTO.num_tokens * HIDDEN * 4) as system:
        for image in (PHOTO, draw(5, 256, 256, 256, 256), otherwise):  # the second one drives the first one out
            messages = [message("user", 0, "what is it?" if image is otherwise else "describe the image")]
            reply = await system.generate(make_request(messages, [image]), [image])
            assert reply.admitted.missing
            assert reply.ids() == published_reply(flash, messages, [image])
        await system.at_rest()


async def test_a_flash_image_is_known_by_what_became_of_it(start_flash, flash):
    messages = [message("user", 0, LONG)]
    async with start_flash(feature_bytes=PHOTO.num_tokens * HIDDEN * 4) as system:
        first = await system.generate(make_request(messages, [PHOTO]), [PHOTO])
        big = draw(5, 256, 256, 256, 256)
        await system.generate(make_request([message("user", 0, "x")], [big]), [big])
        again = await system.generate(make_request(messages, [PHOTO]))
        assert not again.admitted.missing
        assert again.ids() == first.ids() == published_reply(flash, messages, [PHOTO])
        usage = again.finished[0].usage
        assert (usage.image_tokens, usage.saved_tokens) == (len(PHOTO.features), 2 * 192)
        await system.at_rest()


async def test_a_flash_image_behind_one_whose_kv_is_held_may_turn_out_otherwise(start_flash, flash):
    """Its KV is not here any more, its sizes are known, and this time they are others."""
    turns = [message("user", 0, LONG), message("assistant", "4"), message("user", 1, LONG)]
    otherwise = draw(9, 256, 64)
    otherwise.mm_hash = WIDE.mm_hash
    async with start_flash(feature_bytes=6 * 256 * HIDDEN * 4) as system:
        await system.generate(make_request(turns[:1], [PHOTO]), [PHOTO])
        await system.generate(make_request([message("user", 0, "x")], [WIDE]), [WIDE])
        big = draw(5, *[256] * 6)
        await system.generate(make_request([message("user", 0, "x")], [big]), [big])  # drives both out
        await system.at_rest()
        reply = await system.generate(make_request(turns, [PHOTO, otherwise]), [PHOTO, otherwise])
        assert [missing.image_index for missing in reply.admitted.missing] == [1]
        assert reply.ids() == published_reply(flash, turns, [PHOTO, otherwise])
        await system.at_rest()


# --- room


async def test_the_true_length_decides_what_fits(start_flash, flash):
    messages = [message("user", 0, "describe")]
    async with start_flash(max_model_len=700) as system:
        reply = await system.generate(make_request(messages, [PHOTO], max_tokens=0, ignore_eos=True), [PHOTO])
        assert reply.admitted.num_prompt_tokens > 700 > reply.finished[0].usage.prompt_tokens
        usage = reply.finished[0].usage
        assert usage.prompt_tokens + usage.completion_tokens == 700
        assert reply.ids()[:12] == published_reply(flash, messages, [PHOTO])
        long = draw(6, 256, 256, 256, 64)
        request = make_request(messages, [long])
        call = system.open(request)
        admitted = (await call.read()).admitted
        await system.deliver(request, admitted, [long], 0)
        error = await failure(rest_of(call))
        assert (type(error), error.code, error.param) == (InvalidRequest, "context_length_exceeded", "messages")
        await system.at_rest()


async def test_what_cannot_fit_however_compressed_is_refused_before_anything_is_encoded(start_flash):
    async with start_flash(max_model_len=300, feature_bytes=4 * 256 * HIDDEN * 4) as system:
        held = system.open(make_request([message("user", 0, "x")], [WIDE]))
        assert (await held.read()).admitted.missing  # and its memory is not waited for
        error = await failure(system.generate(make_request([message("user", 0, "x " * 20)], [PHOTO])))
        assert (type(error), error.code) == (InvalidRequest, "context_length_exceeded")
        assert "at least" in error.message
        assert system.in_use.calls == 1
        held.cancel()
        await system.at_rest()


async def test_sizes_that_are_known_count_before_anything_is_encoded(start_flash):
    async with start_flash(max_model_len=600) as system:
        await system.generate(make_request([message("user", 0, "x")], [WIDE]), [WIDE])
        request = make_request([message("user", 0, 1, "x")], [WIDE, draw(7, 64)])
        error = await failure(system.generate(request))  # 512 rows are here, 64 more do not fit beside the text
        assert (type(error), error.code) == (InvalidRequest, "context_length_exceeded")
        await system.at_rest()


async def test_a_reply_is_continued_and_choices_share_their_prompt(flash_system):
    messages, options = [message("user", LONG, 0)], {"temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = await flash_system.generate(make_request(messages, [PHOTO], n=2, **options), [PHOTO])
    assert whole.ids(0) != whole.ids(1)
    rest = await flash_system.generate(make_request(messages, [PHOTO], output_token_ids=whole.ids(0)[:5], **options))
    assert rest.ids() == whole.ids(0)[5:]


# --- what can be computed meanwhile


async def test_text_before_the_first_image_is_computed_while_its_tiles_are_awaited(flash_system, flash):
    messages = [message("user", LONG, 0, "describe")]
    request, before = make_request(messages, [ICON]), tokens_run()
    call = flash_system.open(request)
    reply = Reply(admitted := (await call.read()).admitted)
    await eventually(lambda: tokens_run() > before)
    assert flash_system.in_use.blocks > 0
    stats = flash_system.server.engine.stats
    assert (stats.num_running, stats.num_waiting_for_features) == (1, 1)
    await flash_system.deliver(request, admitted, [ICON], 0)
    for event in await rest_of(call):
        reply.add(event)
    assert reply.ids() == published_reply(flash, messages, [ICON])
    usage = reply.finished[0].usage
    assert usage.cached_tokens == 0  # it is this request's own
    assert tokens_run() - before == usage.prompt_tokens + usage.completion_tokens - 1  # and nothing was computed twice


async def test_waiting_for_tiles_is_not_waiting_in_line(flash_system):
    request, started = make_request([message("user", 0, "x")], [ICON]), time.monotonic()
    call = flash_system.open(request)
    admitted = (await call.read()).admitted
    await asyncio.sleep(0.3)
    await flash_system.deliver(request, admitted, [ICON], 0)
    timings = (await rest_of(call))[-1].finished.timings
    assert timings.feature_wait_ms > 250
    assert timings.queue_ms + timings.feature_wait_ms < (time.monotonic() - started) * 1000


async def test_images_that_are_here_are_computed_while_the_next_one_is_awaited(flash_system, flash):
    icon = draw(8, 64)
    await flash_system.generate(make_request([message("user", 0, "x")], [icon]), [icon])
    messages = [message("user", LONG, 0, "and ", 1, "same number?")]
    request, before = make_request(messages, [icon, PHOTO]), tokens_run()
    call = flash_system.open(request)
    reply = Reply(admitted := (await call.read()).admitted)
    assert [missing.image_index for missing in admitted.missing] == [1]
    await eventually(lambda: tokens_run() - before > 64)
    await flash_system.deliver(request, admitted, [icon, PHOTO], 1)
    for event in await rest_of(call):
        reply.add(event)
    assert reply.ids() == published_reply(flash, messages, [icon, PHOTO])
    usage = reply.finished[0].usage
    computed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens - 1
    assert tokens_run() - before == computed


@pytest.mark.parametrize("parts", [[0], video(0, 4)], ids=["image", "video"])
async def test_tiles_are_computed_while_the_next_ones_are_awaited(flash_system, flash, parts):
    messages = [message("user", LONG, *parts, "what?")]
    request, before = make_request(messages, [CLIP]), tokens_run()
    call = flash_system.open(request)
    reply = Reply(admitted := (await call.read()).admitted)
    await eventually(lambda: tokens_run() > before)
    for tile in range(3):
        so_far = tokens_run()
        await flash_system.deliver(request, admitted, [CLIP], 0, tiles=[tile])
        await eventually(lambda so_far=so_far: tokens_run() > so_far)
    await flash_system.deliver(request, admitted, [CLIP], 0, tiles=[3])
    for event in await rest_of(call):
        reply.add(event)
    assert reply.ids() == published_reply(flash, messages, [CLIP])
    usage = reply.finished[0].usage
    assert usage.cached_tokens == 0
    assert tokens_run() - before == usage.prompt_tokens + usage.completion_tokens - 1


async def test_with_a_barrier_nothing_is_computed_before_the_last_tile(start_flash, flash):
    messages = [message("user", LONG, 0, "what?")]
    async with start_flash(streamed_prefill=False) as system:
        request, before = make_request(messages, [PHOTO]), tokens_run()
        call = system.open(request)
        reply = Reply(admitted := (await call.read()).admitted)
        await system.deliver(request, admitted, [PHOTO], 0, tiles=[0, 1, 2])
        await asyncio.sleep(0.2)
        assert tokens_run() == before
        await system.deliver(request, admitted, [PHOTO], 0, tiles=[3])
        for event in await rest_of(call):
            reply.add(event)
        assert reply.ids() == published_reply(flash, messages, [PHOTO])
        await system.at_rest()


async def test_leaving_while_the_length_is_open_frees_everything(flash_system):
    call = flash_system.open(make_request([message("user", LONG, 0)], [WIDE]))
    await call.read()
    await eventually(lambda: flash_system.in_use.blocks > 0)
    assert flash_system.in_use.feature_bytes == WIDE.features.nbytes
    call.cancel()
    await flash_system.at_rest()


async def test_tiles_that_do_not_come_end_the_request(start_flash):
    async with start_flash(feature_timeout=0.2) as system:
        request = make_request([message("user", LONG, 0)], [PHOTO])
        call = system.open(request)
        admitted = (await call.read()).admitted
        await system.deliver(request, admitted, [PHOTO], 0, tiles=[0, 2])
        error = await failure(rest_of(call))
        assert isinstance(error, DeadlineExceeded)
        await system.at_rest()
        error = await failure(rest_of(system.open(make_request([message("user", 0, "x")], [PHOTO]), timeout=0.1)))
        assert isinstance(error, DeadlineExceeded)
        await system.at_rest()


async def test_when_the_engine_dies_who_waits_for_tiles_is_told(start_flash, monkeypatch):
    async with start_flash() as system:
        waiting = system.open(make_request([message("user", LONG, 0)], [WIDE]))
        await waiting.read()
        await eventually(lambda: system.server.engine.stats.num_waiting_for_features == 1)

        def step(limits):
            raise RuntimeError("device lost")

        monkeypatch.setattr(system.server.engine._engine, "step", step)
        system.server.engine.wake()
        assert isinstance(await failure(rest_of(waiting)), Unavailable)
        assert isinstance(system.server.engine.ended.exception(), RuntimeError)


async def test_many_at_once_are_not_mixed_up(start_flash, flash):
    async with start_flash(max_num_seqs=4, feature_bytes=8 * 256 * HIDDEN * 4) as system:
        work = []
        for index, image in enumerate((PHOTO, CLIP, ICON, WIDE) * 3):
            parts = video(0, 4) if image.is_video else [0]
            work.append(([message("user", f"{LONG[: index * 9]} {index}", *parts, "what?")], [image]))
        replies = await asyncio.gather(*(system.generate(make_request(*each), each[1]) for each in work))
        for (messages, images), reply in zip(work, replies, strict=True):
            assert reply.ids() == published_reply(flash, messages, images)
        await system.at_rest()


# --- what is said


async def test_tiles_of_other_sizes_are_refused(flash_system):
    odd = draw(10, 128, 256)
    request = make_request([message("user", 0, "x")], [odd])
    call = flash_system.open(request)
    admitted = (await call.read()).admitted
    with pytest.raises(FrameRejected, match="shape"):
        await flash_system.deliver(request, admitted, [odd], 0, tiles=[0])
    call.cancel()


async def test_tokens_are_counted_by_kind(flash_system):
    def counts():
        kinds = [metrics.LANGUAGE_PROMPT_TOKENS.labels(kind)._value.get() for kind in ("text", "image", "video")]
        return [*kinds, metrics.LANGUAGE_VIR_SAVED_TOKENS._value.get()]

    before = counts()
    images = [PHOTO, CLIP]
    request = make_request([message("user", 0, *video(1, 4), "what?")], images)
    usage = (await flash_system.generate(request, images)).finished[0].usage
    await flash_system.at_rest()
    num_text_tokens = usage.prompt_tokens - 640 - 448
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [
        num_text_tokens,
        640,
        448,
        8 * 256 - 640 - 448,
    ]


async def test_routers_learn_that_tiles_may_be_compressed_and_when(flash_system):
    call = flash_system.stub.WatchStatus(WatchStatusRequest(router_id="test"), timeout=20)
    model = (await call.read()).model
    assert model.is_flash
    assert model.vir_relative_threshold == pytest.approx(RELATIVE_THRESHOLD)
    assert model.vir_absolute_threshold == pytest.approx(ABSOLUTE_THRESHOLD)
    call.cancel()
