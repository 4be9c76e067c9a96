"""A language server in this process on a tiny random checkpoint, and its neighbours: a router, a vision server."""

import asyncio
import dataclasses
import itertools
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from common.service import rpc
from common.transport.select import SenderPool
from language_server.server import LanguageServer
from language_server.settings import LanguageSettings
from protos import language_pb2_grpc
from protos.frame import FrameHeader, pack_header, with_checksum
from protos.language_pb2 import Admitted, Continuation, Finished, GenerateRequest, ImageRef, SamplingParams, Token
from tests.checkpoints import make_checkpoint
from tests.language_server.messages import message

TOKENS_PER_TILE = 256


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("language") / "checkpoint")


@dataclass
class Image:
    """What a vision server makes of an image or a video."""

    features: torch.Tensor  # [sum(sizes), hidden]
    sizes: list[int]  # tokens of each tile
    mm_hash: bytes
    pixel_values: torch.Tensor | None = None  # [num_tiles, 3, 448, 448], of which the features were made
    is_video: bool = False

    @property
    def num_tiles(self):
        return len(self.sizes)

    @property
    def num_tokens(self):
        """At most."""
        return self.num_tiles * TOKENS_PER_TILE

    @property
    def tiles(self):
        return self.features.split(self.sizes)


@pytest.fixture(scope="session")
def images(checkpoint):
    """Three images of 1, 2 and 1 tiles."""
    return [_draw(checkpoint.reference(), index, num_tiles) for index, num_tiles in enumerate((1, 2, 1))]


@torch.inference_mode()
def _draw(model, seed, num_tiles):
    pixel_values = torch.randn(num_tiles, 3, 448, 448, generator=torch.Generator().manual_seed(seed))
    features = model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
    sizes = [TOKENS_PER_TILE] * num_tiles
    return Image(features.flatten(0, 1).contiguous(), sizes, bytes([seed]) * 32, pixel_values)


@torch.inference_mode()
def reference_tokens(checkpoint, messages, images=(), num_tokens=12):
    """Greedy ids of the undivided model for the prompt its own chat template and processor would make."""
    rendered = checkpoint.tokenizer.apply_chat_template(
        [{"role": m.role, "content": [_hf_part(part) for part in m.parts]} for m in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    for image in images:
        rendered = rendered.replace("<IMG_CONTEXT>", f"<img>{'@' * image.num_tokens}</img>", 1)
    input_ids = torch.tensor([checkpoint.tokenizer(rendered.replace("@", "<IMG_CONTEXT>"))["input_ids"]])
    pixels = {"pixel_values": torch.cat([image.pixel_values for image in images])} if images else {}
    output = checkpoint.reference().generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        **pixels,
    )
    return output[0, input_ids.shape[1] :].tolist()


def _hf_part(part):
    return {"type": "text", "text": part.text} if part.WhichOneof("part") == "text" else {"type": "image"}


_request_ids = itertools.count(1)


def make_request(messages, images=(), *, output_token_ids=(), continuations=(), thinking=False, **sampling):
    """A greedy request as a router would send it; ``messages`` may be the text of the only one, ``output_token_ids``
    what a lost server said of the first choice."""
    messages = [message("user", messages)] if isinstance(messages, str) else messages
    values = {"max_tokens": 12, "top_p": 1.0, "repetition_penalty": 1.0, "n": 1, "skip_special_tokens": True}
    return GenerateRequest(
        request_id=next(_request_ids).to_bytes(16, "big"),
        messages=messages,
        images=[
            ImageRef(mm_hash=image.mm_hash, max_num_tokens=image.num_tokens, is_video=image.is_video)
            for image in images
        ],
        sampling=SamplingParams(**(values | sampling)),
        continuations=continuations or ([Continuation(output_token_ids=output_token_ids)] if output_token_ids else []),
        thinking=thinking,
    )


@dataclass
class Reply:
    """Everything one Generate call said."""

    admitted: Admitted | None = None
    tokens: list[Token] = field(default_factory=list)
    finished: dict[int, Finished] = field(default_factory=dict)

    def add(self, event):
        kind = event.WhichOneof("event")
        if kind == "admitted":
            assert self.admitted is None
            self.admitted = event.admitted
        elif kind == "token":
            assert self.admitted is not None and event.token.choice not in self.finished
            self.tokens.append(event.token)
        else:
            assert event.finished.choice not in self.finished
            self.finished[event.finished.choice] = event.finished

    def ids(self, choice=0):
        return [token.token_id for token in self.tokens if token.choice == choice]

    def text(self, choice=0):
        return "".join(token.text for token in self.tokens if token.choice == choice) + self.finished[choice].text

    def reasoning(self, choice=0):
        pieces = [token.reasoning for token in self.tokens if token.choice == choice]
        return "".join(pieces) + self.finished[choice].reasoning


@dataclass
class System:
    """The server, a client that plays the router, and a sender that plays the vision servers."""

    server: LanguageServer
    stub: language_pb2_grpc.LanguageStub
    senders: SenderPool

    async def generate(self, request, images=(), timeout=60.0, metadata=None):
        """Run a request to its end, delivering each image's features as soon as they are asked for."""
        reply, deliveries = Reply(), []
        async for event in self.stub.Generate(request, timeout=timeout, metadata=metadata):
            reply.add(event)
            for missing in event.admitted.missing:
                delivery = self.deliver(request, event.admitted, images, missing.image_index)
                deliveries.append(asyncio.create_task(delivery))
        await asyncio.gather(*deliveries)
        return reply

    async def deliver(self, request, admitted, images, index, *, tiles=None, attempt=0, features=None, **changes):
        """Send the tiles of one image, last one first; returns the transports that carried them."""
        image = images[index]
        ticket = changes.pop("ticket", None) or next(m.ticket for m in admitted.missing if m.image_index == index)
        rows = image.tiles if features is None else features.split(image.sizes)
        used = set()
        for tile in reversed(range(image.num_tiles)) if tiles is None else tiles:
            payload = rows[tile].numpy()
            header = FrameHeader(
                self.server._fingerprint,
                request.request_id,
                index,
                attempt,
                tile,
                image.num_tiles,
                payload.shape[1],
                "float32",
                (len(payload),),
                0,
            )
            header = with_checksum(dataclasses.replace(header, **changes), payload)
            used.add(await self.senders.send(admitted.deliver_to, pack_header(header, ticket), payload, 10.0))
        return used

    def open(self, request, timeout=60.0):
        return self.stub.Generate(request, timeout=timeout)

    @property
    def in_use(self):
        """What requests hold now; all zero at rest."""
        stats, features = self.server.engine.stats, self.server.features
        assert stats is not None
        return SimpleNamespace(
            blocks=stats.num_total_blocks - stats.num_free_blocks,
            sequences=stats.num_running + stats.num_waiting + self.server.engine.num_live,
            feature_bytes=features.reserved_bytes,
            waiting_reservations=features.num_waiting,
            calls=len(self.server._servicer._open),
        )

    async def at_rest(self):
        await eventually(lambda: not any(vars(self.in_use).values()), lambda: str(self.in_use))


async def eventually(is_true, describe=lambda: "still not true"):
    """Poll until something holds; events of another process or thread leave no better way."""
    give_up = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < give_up, describe()
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running_system(checkpoint, directory, transports=("zmq", "grpc"), **options):
    settings = LanguageSettings(
        model=checkpoint.path,
        listen=f"unix:{directory}/s",
        feature_listen=f"unix-dir:{directory}/f",
        metrics_listen=None,
        device="cpu",
        dtype="float32",
        transports=transports,
        **({"kv_cache_bytes": 16 * 2**20, "feature_bytes": 2**22} | options),
    )
    server = LanguageServer(settings)
    await server.start()
    channel = rpc.make_channel(server.address)
    senders = SenderPool()
    try:
        await server.load()
        yield System(server, language_pb2_grpc.LanguageStub(channel), senders)
    finally:
        await senders.close()
        await channel.close()
        await server.close()


@pytest.fixture
def start_system(checkpoint, tmp_path):
    """``async with start_system(option=...) as system``."""
    return lambda **options: running_system(checkpoint, tmp_path, **options)


@pytest.fixture
async def system(start_system):
    async with start_system() as system:
        yield system
        await system.at_rest()
