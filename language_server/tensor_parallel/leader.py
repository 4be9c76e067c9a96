"""Rank 0's backbone: for the engine a language model like any other, behind which all ranks compute."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.model.checkpoint import Checkpoint
from common.model.config import InternVLConfig
from common.service.errors import ConfigError, TransportFailed
from language_server.attention.base import BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.kv_memory import default_kv_bytes
from language_server.tensor_parallel.channel import Kind, Message
from language_server.tensor_parallel.collectives import Collectives
from language_server.tensor_parallel.order import Order
from language_server.tensor_parallel.plan import OPTION, Plan
from language_server.tensor_parallel.shard import ShardBackbone, load_shard
from language_server.tensor_parallel.workers import Workers


def rank_devices(first: torch.device, num_ranks: int) -> list[torch.device]:
    """The GPUs from ``first`` on, or the CPU for all. Raises ConfigError where there are not that many."""
    if first.type != "cuda" or num_ranks == 1:
        return [first] * num_ranks
    start, num_gpus = first.index or 0, torch.cuda.device_count()
    if start + num_ranks > num_gpus:
        raise ConfigError(
            f"{OPTION} {num_ranks}: needs cuda:{start} to cuda:{start + num_ranks - 1}, torch sees {num_gpus} GPUs"
        )
    return [torch.device("cuda", start + rank) for rank in range(num_ranks)]


class Group:
    """All ranks of one model, as rank 0 holds them together: its own side, the workers, and where they meet."""

    def __init__(
        self,
        model: Path,
        devices: list[torch.device],
        *,
        dtype: torch.dtype,
        timeout: float,
        kv_memory_fraction: float,
        threads: int | None,
        log_level: str,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dvd-ranks-")  # mode 0700
        self._kv_memory_fraction = kv_memory_fraction
        num_ranks = len(devices)
        self.ranks = Collectives(0, num_ranks, devices[0], timeout)
        if devices[0].type == "cpu":  # they share its cores
            threads = threads or max(1, torch.get_num_threads() // num_ranks)
            torch.set_num_threads(threads)
        orders = [
            Order(
                model=str(model),
                rank=rank,
                num_ranks=num_ranks,
                device=str(devices[rank]),
                dtype=str(dtype).removeprefix("torch."),
                directory=self._directory.name,
                timeout=timeout,
                kv_memory_fraction=kv_memory_fraction,
                threads=threads,
                log_level=log_level,
            )
            for rank in range(1, num_ranks)
        ]
        self.workers = Workers(orders, on_failure=self.ranks.abort)

    def join(self, on_tick: Callable[[], None]) -> int:
        """Wait until all have loaded, and meet; returns the KV memory that each of them can give, in bytes.

        Raises:
            StartupError: a rank could not load, or said nothing for too long.
        """
        theirs = self.workers.wait_until_loaded(on_tick)
        smallest = min(default_kv_bytes(self.ranks.device, self._kv_memory_fraction), *theirs)
        self.workers.tell(Message(Kind.JOIN))
        with self.explained():
            self.ranks.join(Path(self._directory.name))
        self.workers.serve()
        return smallest if self.ranks.device.type == "cuda" else smallest // self.ranks.num_ranks

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What kept us from another rank becomes what happened to it."""
        try:
            yield
        except TransportFailed as error:
            raise self.workers.explain(error) from error

    def close(self) -> None:
        """End the workers. Harmless when they have ended."""
        self.workers.close()
        self.ranks.leave()
        self._directory.cleanup()


class TensorParallelBackbone(ShardBackbone):
    """What the engine calls. Raises Unavailable, within the group's timeout, when a rank is gone or stuck.

    Attributes:
        kv_bytes: KV memory that every rank can give.
    """

    def __init__(self, model: Any, plan: Plan, group: Group, kv_bytes: int) -> None:
        super().__init__(model, plan, group.ranks)
        self.kv_bytes = kv_bytes
        self._group = group
        self._cache: KVCache | None = None

    def forward(self, inputs_embeds: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """See LanguageBackbone."""
        layout, ranks, workers = context.layout, self.ranks, self._group.workers
        if not isinstance(layout, BatchLayout):
            raise RuntimeError("ranks are told lengths by the host, which a graph cannot hold")
        with self._group.explained():
            if context.cache is not self._cache:
                self._cache = context.cache
                workers.tell(Message(Kind.CACHE, (len(self._cache.keys[0]), self._cache.block_size)))
            width = layout.block_tables.shape[1]
            workers.tell(Message(Kind.STEP, (len(inputs_embeds), width, *layout.query_lens, *layout.seq_lens)))
            ranks.from_first(torch.cat([layout.position_ids, layout.block_tables.flatten()]))
            ranks.from_first(inputs_embeds)
            return super().forward(inputs_embeds, context)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See LanguageBackbone. What it returns is there: a GPU may have to wait for ranks that never come."""
        if not len(hidden):
            return hidden.new_empty(0, self.vocab_size, dtype=torch.float32)
        with self._group.explained():
            self._group.workers.tell(Message(Kind.LOGITS, (len(hidden),)))
            self.ranks.from_first(hidden)
            logits = self.gather_logits(hidden)
            self.ranks.wait(self.check)
        assert logits is not None  # this is rank 0
        return logits

    def check(self) -> None:
        """Raises what has happened to another rank, if anything has. From any thread, at no cost."""
        self._group.workers.check()

    def close(self) -> None:
        """End the other ranks. Nothing can be computed any more."""
        self._group.close()


def load_tensor_parallel(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    devices: list[torch.device],
    *,
    dtype: torch.dtype,
    timeout: float,
    kv_memory_fraction: float = 0.85,
    threads: int | None = None,
    log_level: str = "info",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TensorParallelBackbone:
    """Start a rank for each device but the first, which is ours, and load a share of the model on each.

    Args:
        timeout: seconds that a rank may take for its part of a step.
        threads: CPU threads of each rank; None: on a CPU, equal shares of what torch would take.
        progress: as for ``load_role``; called now and then while the others still load.

    Raises:
        CheckpointError, ConfigError, StartupError: nothing is left running then, as for what ``progress`` raises.
    """
    group = Group(
        checkpoint.path,
        devices,
        dtype=dtype,
        timeout=timeout,
        kv_memory_fraction=kv_memory_fraction,
        threads=threads,
        log_level=log_level,
    )
    loaded = (0, 0)

    def watched(done: int, total: int) -> None:
        nonlocal loaded
        loaded = (done, total)
        group.workers.check()
        progress(done, total)

    try:
        group.workers.start()
        if devices[0].type == "cuda":
            torch.cuda.set_device(devices[0])
        model, plan = load_shard(checkpoint, config, group.ranks, dtype=dtype, progress=watched)
        kv_bytes = group.join(lambda: progress(*loaded))
    except BaseException:  # Ctrl-C as well: no rank may be left behind
        group.close()
        raise
    return TensorParallelBackbone(model, plan, group, kv_bytes)
