"""The language server as a program: ``start`` (listen), ``load`` (weights, engine, warm-up), serve, ``drain``.

Puts the parts together and knows nothing of tokens. Routers see it from the first moment, in state STARTING.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Final

import torch

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.model.config import InternVLConfig, load_config
from common.model.device import choose_device, choose_dtype, export_memory
from common.service import announce, metrics, rpc
from common.service.errors import Cancelled, ConfigError
from common.service.health import add_health
from common.service.keys import Keys
from common.service.program import DRAIN_NOTICE_SECONDS, Progress
from common.service.status import StatusBoard
from common.transport.advertise import advertised
from common.transport.base import FeatureReceiver
from common.transport.registry import choose_transports, make_receivers
from common.transport.sender import TransportLimits
from language_server.backbone import LanguageBackbone, load_backbone
from language_server.cpu_threads import OWN_CORES_TOLERANCE, SHARED_CORES_TOLERANCE, tune_decode_threads
from language_server.engine import EngineConfig, EngineStats, LanguageEngine
from language_server.engine_thread import EngineThread
from language_server.feature_image import FeatureLayout
from language_server.features import FeatureStore
from language_server.generation import Backend
from language_server.grammar import GrammarCompiler
from language_server.pace import PrefillPace
from language_server.prompt import PromptBuilder
from language_server.quantization import Quantization, choose_quantization
from language_server.servicer import LanguageServicer
from language_server.settings import LanguageSettings
from language_server.tensor_parallel.leader import TensorParallelBackbone, load_tensor_parallel, rank_devices
from language_server.tensor_parallel.plan import check_size
from language_server.texts import Texts
from language_server.token_rate import TokenRate
from language_server.tokenizer import Tokenizer
from protos import frame, language_pb2_grpc
from protos.status_pb2 import (
    FEATURE_DTYPE_BFLOAT16,
    FEATURE_DTYPE_FLOAT32,
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    Endpoint,
    LanguageLoad,
    ModelInfo,
)

log = logging.getLogger(__name__)

MAX_CHOICES: Final = 64
_TITLE: Final = "language server"
_TOKENISING_THREADS: Final = 2
_COMPILING_THREADS: Final = 2
_STOP_SECONDS: Final = 10.0
_LINGER_SECONDS: Final = 0.25
"""For events already made to reach their callers; ``WatchStatus`` streams would never end by themselves."""


class LanguageServer:
    """All parts of one language server. Construction reads headers only; raises StartupError on what cannot work.

    Args:
        receivers: take frames, best first, instead of the transports that ``settings`` name.
        turn: of whoever computes on the same device in this process; entered for each step.
    """

    def __init__(
        self,
        settings: LanguageSettings,
        *,
        receivers: Sequence[FeatureReceiver] | None = None,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self.settings = settings
        self.config = load_config(settings.model)
        self._devices = rank_devices(choose_device(settings.device), settings.tensor_parallel_size)
        self.device = self._devices[0]
        self.dtype = choose_dtype(settings.dtype, self.device)
        self.max_model_len = _max_model_len(settings, self.config)
        self._checkpoint = Checkpoint.open(settings.model)
        self.quantization = choose_quantization(
            settings.quantization, self._checkpoint, self.config, dtype=self.dtype, device=self.device
        )
        weights = memory.weight_bytes(self._checkpoint, "language", self.dtype, self.quantization.num_bytes)
        _check_division(settings, self.config, self.quantization)
        _check_memory(settings, weights, self.device)
        self._fingerprint = self._checkpoint.fingerprint(self.config)
        self._tokenizer = Tokenizer.load(settings.model)
        self._prompts = PromptBuilder(self._tokenizer, self.config.template, self.config.system_message)
        self._metrics_address = _start_metrics(settings)
        self._model_info = self._describe_model()
        self.board = StatusBoard(
            settings.name, self._fingerprint, self._model_info, self._load_report, self._metrics_address
        )
        max_num_live = settings.max_num_seqs + settings.max_num_waiting
        self._token_rate = TokenRate()
        self._takes_turns = turn is not None
        self.engine = EngineThread(
            max_num_live,
            on_progress=self._beat,
            turn=turn,
            pace=PrefillPace(settings.max_prefill_stretch, settings.max_text_prefill_stretch),
            is_awaiting_features=lambda: self.features.num_awaited > 0,
        )
        self.features = FeatureStore(
            self._feature_layout(),
            settings.feature_bytes,
            seals_features=settings.encrypt_features,
            on_ready=self.engine.wake,
        )
        self._keys = Keys.given(settings.keys, "language")
        self._receivers = _make_receivers(settings, self._keys) if receivers is None else receivers
        self._servicer = LanguageServicer(self.board, settings.request_timeout, max_num_live)
        self._grpc = rpc.make_server()
        add_health(self._grpc, self.board)
        language_pb2_grpc.add_LanguageServicer_to_server(self._servicer, self._grpc)  # type: ignore[no-untyped-call]
        self._tokenising = ThreadPoolExecutor(_TOKENISING_THREADS, thread_name_prefix="tokenise")
        # Apart from the former: some grammars take seconds, and nobody else's text may wait for them.
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="compile")
        # Whoever takes turns with us leaves its cores idle during ours.
        self._tolerances = (OWN_CORES_TOLERANCE, SHARED_CORES_TOLERANCE) if turn is None else (1.0, 1.0)
        self._is_load_aborted = threading.Event()
        self._ranks: TensorParallelBackbone | None = None
        self._deliver_to: list[Endpoint] = []
        self.address = ""

    async def start(self) -> None:
        """Listen, answering that the server is not ready. Raises ConfigError if the address cannot be had."""
        self.address = rpc.bind(self._grpc, self.settings.listen, self._keys, guard=self.settings.guard)
        bound = [await receiver.start(self.features) for receiver in self._receivers]
        self._deliver_to = [advertised(endpoint, self.settings.feature_advertise) for endpoint in bound]
        await self._grpc.start()

    async def load(self, progress: Progress = lambda done, total: None) -> None:
        """Read the weights, make the engine, run one token to warm up, and open the doors.

        Raises:
            CheckpointError: the checkpoint does not fit its config.
            ConfigError: the options do not fit the device, or memory ran out.
            Cancelled: ``abort_load`` was called.
        """

        def watched(done: int, total: int) -> None:
            if self._is_load_aborted.is_set():
                raise Cancelled("stopped while loading")
            self.board.bump()
            progress(done, total)

        started = time.monotonic()
        with memory.explained(_TITLE, self.device):
            engine = await self.engine.call(lambda: self._make_engine(watched))
            loaded = time.monotonic()
            await self.engine.call(engine.warm_up)
        decode_threads = await self.engine.call(lambda: tune_decode_threads(engine, *self._tolerances))
        export_memory(self.device)
        metrics.LOAD_SECONDS.labels("weights").set(loaded - started)
        metrics.LOAD_SECONDS.labels("warmup").set(time.monotonic() - loaded)
        if self.device.type == "cpu":
            self.board.count_cpu_time(await self.engine.call(threading.get_ident))
        self.engine.start(engine, decode_threads)
        # Before the first request that needs it: meanwhile all others would stand still.
        grammars = await asyncio.get_running_loop().run_in_executor(self._compiling, self._make_grammars)
        self._servicer.backend = self._make_backend(self._deliver_to, engine, grammars)
        self._servicer.texts = self._make_texts()
        self._model_info.max_model_len = engine.max_model_len  # less where KV memory is short
        self._export_gauges()
        self.board.state = WORKER_STATE_READY
        announce.write(
            self.settings.announce,
            name=self.settings.name,
            role="language",
            address=self.address,
            metrics_address=self._metrics_address,
        )

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the engine's thread is."""
        if self.engine.ended is None:
            raise RuntimeError("the engine was not started")
        return self.engine.ended

    @property
    def ready_line(self) -> str:
        stats = self.engine.stats
        num_blocks = 0 if stats is None else stats.num_total_blocks
        ranks = f" x{len(self._devices)}" if len(self._devices) > 1 else ""
        return (
            f"language server ready at {self.address} model {self.settings.model_name} device {self.device}{ranks}"
            f" dtype {str(self.dtype).removeprefix('torch.')} quantization {self.quantization}"
            f" context {self._model_info.max_model_len}"
            f" KV blocks {num_blocks}"
        )

    def abort_load(self) -> None:
        """Make ``load`` fail at the next tensor."""
        self._is_load_aborted.set()

    async def drain(self) -> None:
        """Refuse new requests and wait for the admitted ones, at most ``shutdown_timeout`` seconds."""
        self.board.state = WORKER_STATE_DRAINING
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await asyncio.gather(self._servicer.drained(), asyncio.sleep(DRAIN_NOTICE_SECONDS))
        except TimeoutError:
            log.warning("requests still in work after %g s are dropped", self.settings.shutdown_timeout)

    async def close(self) -> bool:
        """Let go of everything; what is still in work fails. False if the engine's thread is stuck."""
        await self._grpc.stop(_LINGER_SECONDS)
        for receiver in self._receivers:
            await receiver.close()
        has_ended = await self.engine.stop(_STOP_SECONDS)
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)
        self._tokenising.shutdown(wait=False)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        return has_ended

    def _load_backbone(self, progress: Progress) -> LanguageBackbone:
        settings = self.settings
        if settings.tensor_parallel_size == 1:
            return load_backbone(
                self._checkpoint,
                self.config,
                dtype=self.dtype,
                device=self.device,
                quantization=self.quantization,
                progress=progress,
            )
        self._ranks = load_tensor_parallel(
            self._checkpoint,
            self.config,
            self._devices,
            dtype=self.dtype,
            timeout=settings.tensor_parallel_timeout,
            kv_memory_fraction=settings.kv_memory_fraction,
            threads=settings.threads,
            log_level=settings.log_level,
            progress=progress,
        )
        return self._ranks

    def _beat(self) -> None:
        """From the engine's thread, after each step and twice a second without one: alive, and so are all ranks."""
        if self._ranks is not None:
            self._ranks.check()
        self.board.bump()

    def _make_engine(self, progress: Progress) -> LanguageEngine:
        backbone = self._load_backbone(progress)
        settings = self.settings
        config = EngineConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            # The thread's own limit counts the running ones too, and refuses before anything is spent.
            max_num_waiting=settings.max_num_seqs + settings.max_num_waiting,
            block_size=settings.block_size,
            kv_cache_bytes=settings.kv_cache_bytes or (None if self._ranks is None else self._ranks.kv_bytes),
            kv_memory_fraction=settings.kv_memory_fraction,
            use_cuda_graphs=settings.cuda_graphs
            and settings.tensor_parallel_size == 1
            and self.quantization.is_capturable,
            compile_layers=settings.compile,
            # Who takes turns leaves nothing running behind its own.
            async_scheduling=None if settings.async_scheduling and not self._takes_turns else False,
        )
        return LanguageEngine(config, backbone, eos_token_ids=self._eos_token_ids, embeds=self.features)

    def _make_grammars(self) -> GrammarCompiler:
        vocab_size, header = self.config.vocab_size, self._prompts.reply_header
        return GrammarCompiler(self._tokenizer, vocab_size, self._eos_token_ids, header)

    def _make_backend(self, deliver_to: list[Endpoint], engine: LanguageEngine, grammars: GrammarCompiler) -> Backend:
        return Backend(
            prompts=self._prompts,
            grammars=grammars,
            tokenizer=self._tokenizer,
            features=self.features,
            engine=self.engine,
            tokenising=self._tokenising,
            compiling=self._compiling,
            deliver_to=deliver_to,
            feature_dtype=FEATURE_DTYPE_FLOAT32 if self.dtype == torch.float32 else FEATURE_DTYPE_BFLOAT16,
            has_priorities=self.settings.scheduling_policy == "priority",
            eos_token_ids=self._eos_token_ids,
            vocab_size=self.config.vocab_size,
            max_model_len=engine.max_model_len,
            block_size=engine.block_size,
            streams_prefill=self.settings.streamed_prefill,
            max_choices=min(MAX_CHOICES, self.settings.max_num_seqs + self.settings.max_num_waiting),
            max_stream_events=self.settings.max_stream_events,
            feature_timeout=self.settings.feature_timeout,
            seq_ids=itertools.count(),
        )

    def _make_texts(self) -> Texts:
        return Texts(
            self._prompts,
            self._tokenizer,
            self._tokenising,
            tokens_per_tile=self.config.tokens_per_tile,
            vocab_size=self.config.vocab_size,
        )

    @property
    def _eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.config.generation.eos_token_ids)

    def _feature_layout(self) -> FeatureLayout:
        return FeatureLayout(
            fingerprint=self._fingerprint,
            hidden_size=self.config.text_hidden_size,
            dtype="float32" if self.dtype == torch.float32 else "bfloat16",
            tokens_per_tile=self.config.tokens_per_tile,
            is_flash=self.config.flash is not None,
        )

    def _describe_model(self) -> ModelInfo:
        tiling, generation, flash = self.config.tiling, self.config.generation, self.config.flash
        return ModelInfo(
            model=self.settings.model_name,
            max_model_len=self.max_model_len,
            image_size=tiling.tile_size,
            tokens_per_tile=self.config.tokens_per_tile,
            min_dynamic_patch=tiling.min_tiles,
            max_dynamic_patch=tiling.max_tiles,
            use_thumbnail=tiling.use_thumbnail,
            dynamic_image_size=tiling.dynamic,
            vocab_size=self.config.vocab_size,
            default_temperature=generation.temperature,
            default_top_p=generation.top_p,
            default_top_k=generation.top_k,
            default_repetition_penalty=generation.repetition_penalty,
            is_flash=flash is not None,
            vir_relative_threshold=0.0 if flash is None else flash.relative_threshold,
            vir_absolute_threshold=0.0 if flash is None else flash.absolute_threshold,
        )

    def _load_report(self) -> LanguageLoad:
        load = LanguageLoad(free_feature_bytes=self.features.free_bytes, max_num_waiting=self.settings.max_num_waiting)
        load.tokens_per_second = self._token_rate.observe(time.monotonic(), self.engine.num_tokens)
        if (stats := self.engine.stats) is not None:
            load.num_running = stats.num_running
            load.num_waiting = stats.num_waiting
            load.free_kv_blocks = stats.num_free_blocks
            load.total_kv_blocks = stats.num_total_blocks
            load.num_preemptions = stats.num_preemptions
        return load

    def _export_gauges(self) -> None:
        """Read from the engine's last step when they are asked for."""

        def of_last_step(value: Callable[[EngineStats], float]) -> Callable[[], float]:
            return lambda: value(self.engine.stats) if self.engine.stats is not None else 0.0

        metrics.LANGUAGE_REQUESTS_RUNNING.set_function(of_last_step(lambda stats: stats.num_running))
        metrics.LANGUAGE_REQUESTS_WAITING.set_function(of_last_step(lambda stats: stats.num_waiting))
        metrics.LANGUAGE_REQUESTS_WAITING_FOR_FEATURES.set_function(
            of_last_step(lambda stats: stats.num_waiting_for_features)
        )
        metrics.LANGUAGE_KV_CACHE_USAGE_RATIO.set_function(
            of_last_step(lambda stats: 1 - stats.num_free_blocks / stats.num_total_blocks)
        )


def _check_division(settings: LanguageSettings, config: InternVLConfig, quantization: Quantization) -> None:
    """Whether the model can be held by several ranks."""
    if settings.tensor_parallel_size == 1:
        return
    check_size(config.text, settings.tensor_parallel_size)
    if settings.compile:
        raise ConfigError("--compile: layers of several ranks are not compiled; --tensor-parallel-size must be 1")
    if quantization.method != "none" or quantization.fp8_on_disk:
        raise ConfigError(
            f"--tensor-parallel-size {settings.tensor_parallel_size}: weights in 8 bits ({quantization}) cannot be"
            " divided; allowed: 1, or a BF16 checkpoint with --quantization none"
        )


def _check_memory(settings: LanguageSettings, weights: int, device: torch.device) -> None:
    """KV and feature memory that nobody asked for take what is left. Features lie in host memory on every device."""
    kv_bytes, num_ranks = settings.kv_cache_bytes or 0, settings.tensor_parallel_size
    if device.type == "cuda":
        weights //= num_ranks
    else:  # which all ranks share
        kv_bytes *= num_ranks
    kv = {"weights": weights, "--kv-cache-bytes": kv_bytes}
    features = {"--feature-bytes": settings.feature_bytes if "feature_bytes" in settings.model_fields_set else 0}
    if device.type == "cuda":
        memory.check_fits(_TITLE, kv, device)
        memory.check_fits(_TITLE, features, torch.device("cpu"))
    else:
        memory.check_fits(_TITLE, kv | features, device)


def _make_receivers(settings: LanguageSettings, keys: Keys | None) -> list[FeatureReceiver]:
    limits = TransportLimits(keys=keys)
    return make_receivers(choose_transports(settings.transports), settings.feature_listen, limits)


def _max_model_len(settings: LanguageSettings, config: InternVLConfig) -> int:
    length = settings.max_model_len or config.max_model_len
    if length > config.max_model_len:
        raise ConfigError(f"max_model_len {length} is above the model's own limit of {config.max_model_len}")
    return length


def _start_metrics(settings: LanguageSettings) -> str:
    metrics.set_model(settings.model_name)
    metrics.BUILD_INFO.labels(version("dvd-serve"), str(frame.VERSION)).set(1)
    return metrics.start_server(settings.metrics_listen, "language") if settings.metrics_listen else ""
