"""Rank 1 or another: holds its share of the model and of the KV memory, and does what rank 0 says while it is there.

Has no options, no address and no say in what is computed. Ends with the socket it hears rank 0 over.
"""

import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Final

import torch

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.service import log as logs
from common.service.errors import DvdError, InternalError, TransportFailed
from language_server.attention import choose_backend
from language_server.attention.base import BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.kv_memory import default_kv_bytes
from language_server.tensor_parallel.channel import Channel, Kind, Message
from language_server.tensor_parallel.collectives import Collectives
from language_server.tensor_parallel.order import Order
from language_server.tensor_parallel.shard import ShardBackbone, load_shard
from language_server.tensor_parallel.workers import ERRORS, EXIT_ALONE

log = logging.getLogger(__name__)

_PROGRESS_SECONDS: Final = 1.0


def serve() -> int:
    """Speak with rank 0 over stdin, which is a socket; returns the exit status."""
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()))
    message = channel.receive()
    if message is None:
        return EXIT_ALONE
    order = Order.from_json(message.text)
    logs.configure(f"language server rank {order.rank}", order.log_level)
    try:
        _obey(channel, order)
    except (TransportFailed, ConnectionError):
        return EXIT_ALONE
    except DvdError as error:
        _tell_failure(channel, error)
        return 1
    # A seam: whatever happens here, rank 0 must hear of it.
    except Exception as error:
        log.critical("this rank cannot go on", exc_info=error)
        _tell_failure(channel, InternalError(f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _obey(channel: Channel, order: Order) -> None:
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    ranks = Collectives(order.rank, order.num_ranks, torch.device(order.device), order.timeout)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    with memory.explained("language server", ranks.device):
        backbone = _load(channel, order, ranks)
        channel.send(Message(Kind.LOADED, (default_kv_bytes(ranks.device, order.kv_memory_fraction),)))
    if channel.receive() is None:  # to join
        return
    ranks.join(Path(order.directory))
    try:
        with torch.inference_mode():
            _Follower(channel, backbone).run()
    finally:
        ranks.leave()


def _load(channel: Channel, order: Order, ranks: Collectives) -> ShardBackbone:
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            channel.send(Message(Kind.PROGRESS, (done, total)))

    model = Path(order.model)
    dtype = torch.bfloat16 if order.dtype == "bfloat16" else torch.float32
    shard = load_shard(Checkpoint.open(model), load_config(model), ranks, dtype=dtype, progress=progress)
    return ShardBackbone(*shard, ranks)


class _Follower:
    """Repeats every step of rank 0 on its own share."""

    def __init__(self, channel: Channel, backbone: ShardBackbone) -> None:
        self._channel = channel
        self._backbone = backbone
        self._attention = choose_backend(backbone.device)
        self._cache: KVCache | None = None

    def run(self) -> None:
        """Until rank 0 has nothing more to say."""
        while (message := self._channel.receive()) is not None:
            match message:
                case Message(Kind.CACHE, (num_blocks, block_size)):
                    self._cache = None  # before its successor is there
                    shape, device = self._backbone.kv_shape, self._backbone.device
                    with memory.explained("language server", device):
                        self._cache = KVCache(shape, num_blocks, block_size, device)
                case Message(Kind.STEP, (num_tokens, width, *lengths)):
                    self._step(num_tokens, width, lengths)
                case Message(Kind.LOGITS, (num_rows,)):
                    self._backbone.gather_logits(self._rows(num_rows))
                case _:
                    raise InternalError(f"rank 0 says {message.kind.name} with {len(message.numbers)} numbers")

    def _step(self, num_tokens: int, width: int, lengths: list[int]) -> None:
        assert self._cache is not None  # rank 0 speaks of it first
        num_seqs = len(lengths) // 2
        ranks = self._backbone.ranks
        places = torch.empty(num_tokens + num_seqs * width, dtype=torch.int64, device=ranks.device)
        ranks.from_first(places)
        layout = BatchLayout(
            query_lens=lengths[:num_seqs],
            seq_lens=lengths[num_seqs:],
            position_ids=places[:num_tokens],
            block_tables=places[num_tokens:].view(num_seqs, width),
            block_size=self._cache.block_size,
        )
        context = ForwardContext.of(layout, self._cache, self._attention)
        self._backbone.forward(self._rows(num_tokens), context)

    def _rows(self, count: int) -> torch.Tensor:
        """Rank 0's, [count, hidden_size]."""
        backbone = self._backbone
        rows = torch.empty(count, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        return backbone.ranks.from_first(rows)


def _tell_failure(channel: Channel, error: DvdError) -> None:
    index = next((index for index, kind in enumerate(ERRORS) if isinstance(error, kind)), 0)
    try:
        channel.send(Message(Kind.FAILED, (index,), error.message))
    except OSError:
        log.error("rank 0 is gone; %s", error)


def main() -> None:
    """Ends without the interpreter's farewell, which may wait for a peer that is gone."""
    status = serve()
    logging.shutdown()
    os._exit(status)
