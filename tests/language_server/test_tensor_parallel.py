"""One model over two real processes computes what it computes in one; when one of them goes, nobody waits for it."""

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import Qwen3Config

from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.model.memory import weight_bytes
from common.service.errors import Cancelled, CheckpointError, ConfigError, InternalError, StartupError, Unavailable
from language_server.backbone import LanguageBackbone, load_backbone
from language_server.engine import EngineConfig, LanguageEngine
from language_server.image_spans import ImageSpan
from language_server.server import LanguageServer
from language_server.settings import LanguageSettings
from language_server.tensor_parallel.channel import Channel, Kind, Message
from language_server.tensor_parallel.leader import TensorParallelBackbone, load_tensor_parallel, rank_devices
from language_server.tensor_parallel.order import Order
from language_server.tensor_parallel.plan import check_size
from language_server.tensor_parallel.workers import Workers
from tests.checkpoints import _TEXT_CONFIGS, make_checkpoint
from tests.language_server.conftest import eventually, make_request, running_system
from tests.language_server.models import paged_logits
from tests.language_server.test_engine import Features, generate, make_sequence

CPU = torch.device("cpu")
DEADLINE = 30.0
PLACEHOLDER = 10
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Every family, every layout on disk, biases, a tied head, a vocabulary that two ranks cannot halve.
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"layout": "github", "text_config": HEADS, "vocab_size": 515},
    "qwen3": {"layout": "hf", "tie_word_embeddings": True},
    "qwen3_moe": {"layout": "hf_legacy", "text_config": HEADS, "shards": 2},
    "gpt_oss": {"layout": "github", "text_config": {"attention_bias": True}},
    "internlm3": {"layout": "hf"},
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One checkpoint, undivided and in two ranks."""

    undivided: LanguageBackbone
    divided: TensorParallelBackbone
    num_bytes: int  # of all weights in float32


@pytest.fixture(scope="class", params=CASES)
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("divided")
    make_checkpoint(path, text=request.param, **CASES[request.param])
    checkpoint, config = Checkpoint.open(path), load_config(path)
    undivided = load_backbone(checkpoint, config, dtype=torch.float32, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # what the environment says counts for nothing
        divided = load_tensor_parallel(checkpoint, config, [CPU] * 2, dtype=torch.float32, timeout=DEADLINE, threads=1)
    workers = pids(divided)
    yield Pair(undivided, divided, weight_bytes(checkpoint, "language", torch.float32))
    divided.close()
    assert not any(map(is_alive, workers))


def pids(backbone: TensorParallelBackbone) -> list[int]:
    return [worker.process.pid for worker in backbone._group.workers._workers]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestParity:
    def test_logits_are_those_of_one_process(self, pair):
        token_ids = torch.arange(20, 100)
        expected, found = (paged_logits(backbone, token_ids) for backbone in (pair.undivided, pair.divided))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_greedy_tokens_are_those_of_one_process(self, pair):
        """Prompts in chunks, batches of strangers, image rows, and too little KV memory for all of them at once."""
        expected, found = (replies(backbone) for backbone in (pair.undivided, pair.divided))
        assert found == expected
        assert len({tuple(reply) for reply in expected}) == len(expected)

    def test_rank_0_holds_half_of_what_is_not_the_embedding(self, pair):
        storages = {each.untyped_storage() for each in pair.divided.model.parameters()}
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        embedding = 4 * pair.divided.vocab_size * pair.divided.hidden_size
        assert held - embedding < 0.6 * (pair.num_bytes - embedding)
        assert pair.divided.kv_shape.num_kv_heads == pair.undivided.kv_shape.num_kv_heads // 2

    def test_ranks_can_be_reached_over_the_loopback_interface_only(self, pair):
        for pid in (os.getpid(), *pids(pair.divided)):
            assert set(local_addresses(pid)) == {"127.0.0.1"}


def replies(backbone: LanguageBackbone) -> list[list[int]]:
    features, rng = Features(), random.Random("prompts")
    config = EngineConfig(max_model_len=128, num_kv_blocks=20, block_size=8, max_num_batched_tokens=24, max_num_seqs=5)
    engine = LanguageEngine(config, backbone, eos_token_ids=[2], embeds=features)
    sequences = [
        make_sequence(index, [rng.randrange(20, 480) for _ in range(rng.randrange(1, 50))]) for index in range(5)
    ]
    for seq_id in (10, 11):
        rows = torch.randn(24, backbone.hidden_size, generator=torch.Generator().manual_seed(seq_id))
        spans = [ImageSpan(0, 5, 24, bytes([seq_id]) * 32)]
        sequence = make_sequence(seq_id, [*range(30, 35), *[PLACEHOLDER] * 24, 40, 41], spans=spans)
        features.put(sequence.request_id, 0, rows)
        sequences.append(sequence)
    found = generate(engine, *sequences)
    assert engine.stats().num_preemptions > 0
    return found


def local_addresses(pid: int) -> Iterator[str]:
    """Of a process's TCP sockets, listening or connected."""
    mine = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if f"socket:[{columns[9]}]" in mine:
                words = bytes.fromhex(columns[1].partition(":")[0])
                swapped = b"".join(words[index : index + 4][::-1] for index in range(0, len(words), 4))
                yield socket.inet_ntop(family, swapped)


# --- refused


@pytest.mark.parametrize(
    ("family", "changes", "size", "said"),
    [
        (
            "qwen3",
            {"num_attention_heads": 8},
            4,
            "num_key_value_heads of this model is 2 and cannot be divided by it; allowed: 1, 2",
        ),
        ("qwen2", HEADS, 3, "num_attention_heads of this model is 4 and cannot be divided by it; allowed: 1, 2"),
        ("qwen3_moe", HEADS | {"moe_intermediate_size": 27}, 2, "moe_intermediate_size of this model is 27 and"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(family, changes, size, said):
    text = _TEXT_CONFIGS[family](**changes).to_dict()
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size {size}: {said}"):
        check_size(text, size)


def test_a_server_refuses_it_before_it_reads_weights(checkpoint):
    options: dict[str, Any] = {"model": checkpoint.path, "device": "cpu", "tensor_parallel_size": 3}
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 3: .* allowed: 1, 2"):
        LanguageServer(LanguageSettings(**options))


def test_a_plan_with_styles_we_do_not_know_is_refused(monkeypatch):
    """What another release of transformers may say."""
    monkeypatch.setattr(Qwen3Config, "base_model_tp_plan", {"layers.*.self_attn.k_proj": "colwise", "norm": "magic"})
    with pytest.raises(ConfigError, match="this release of transformers divides qwen3 by 'magic'"):
        check_size(Qwen3Config().to_dict(), 2)
    monkeypatch.setattr(Qwen3Config, "base_model_tp_plan", None)
    with pytest.raises(ConfigError, match="has no plan for qwen3; allowed: 1"):
        check_size(Qwen3Config().to_dict(), 2)


# --- a rank that goes


@pytest.mark.parametrize(
    ("blow", "is_busy", "said"),
    [
        (signal.SIGKILL, True, "tensor-parallel rank 1 ended with signal SIGKILL"),
        (signal.SIGKILL, False, "tensor-parallel rank 1 ended with signal SIGKILL"),
        (signal.SIGSTOP, True, "tensor-parallel ranks gave no answer within 2 s"),
    ],
    ids=["killed", "killed while nobody asks", "stopped"],
)
async def test_without_a_rank_the_server_ends_and_every_request_is_told(
    checkpoint, tmp_path, caplog, blow, is_busy, said
):
    options = {"tensor_parallel_size": 2, "tensor_parallel_timeout": 2.0, "threads": 1}
    async with running_system(checkpoint, tmp_path, **options) as system:
        ranks = system.server._ranks
        (worker,) = pids(ranks)
        calls = [system.open(make_request(f"Count to {n}.", max_tokens=16000, ignore_eos=True)) for n in range(3)]
        streams = [await first_token(call) for call in calls] if is_busy else []
        os.kill(worker, blow)
        for stream in streams:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                async with asyncio.timeout(DEADLINE):
                    [event async for event in stream]
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
        await eventually(system.server.ended.done)
        with pytest.raises(Unavailable, match=said):
            system.server.ended.result()
    assert not is_alive(worker) and not exists(ranks._group._directory.name)
    said_of_it = [record for record in caplog.records if "tensor-parallel rank" in record.message]
    assert len(said_of_it) == (blow == signal.SIGKILL)


def exists(path: str) -> bool:
    return Path(path).exists()


async def first_token(call):
    """The stream, once it has begun."""
    stream = aiter(call)
    while (await anext(stream)).WhichOneof("event") != "token":
        pass
    return stream


def test_of_three_ranks_the_one_that_went_is_named(tmp_path):
    """The others end as well, and none of them is blamed for what it missed."""
    make_checkpoint(tmp_path, text_config={"num_key_value_heads": 3})
    checkpoint, config = Checkpoint.open(tmp_path), load_config(tmp_path)
    undivided = load_backbone(checkpoint, config, dtype=torch.float32, device=CPU)
    divided = load_tensor_parallel(checkpoint, config, [CPU] * 3, dtype=torch.float32, timeout=DEADLINE, threads=1)
    try:
        token_ids = torch.arange(20, 40)
        expected = paged_logits(undivided, token_ids)
        torch.testing.assert_close(paged_logits(divided, token_ids), expected, atol=5e-5, rtol=1e-5)
        os.kill(pids(divided)[1], signal.SIGKILL)
        with pytest.raises(Unavailable, match="tensor-parallel rank 2 ended with signal SIGKILL"):
            paged_logits(divided, token_ids)
    finally:
        divided.close()
    assert not any(map(is_alive, pids(divided)))


# --- workers alone


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Workers]]:
    started = []

    def start_workers(model: Path) -> Workers:
        order = Order(str(model), 1, 2, "cpu", "float32", str(tmp_path), DEADLINE, 0.8, 1, "info")
        workers = Workers([order])
        started.append(workers)
        workers.start()
        return workers

    yield start_workers
    for workers in started:
        workers.close()
        assert not any(is_alive(worker.process.pid) for worker in workers._workers)


def test_what_a_rank_cannot_load_is_told_in_its_words(start, tmp_path):
    with pytest.raises(CheckpointError, match=r"rank 1: .*no checkpoint folder 'absent'"):
        start(tmp_path / "absent").wait_until_loaded(lambda: None)


def test_a_rank_that_dies_while_it_loads_ends_the_start(start, checkpoint):
    workers = start(checkpoint.path)

    def kill():
        for worker in workers._workers:
            worker.process.kill()

    with pytest.raises(StartupError, match="tensor-parallel rank 1 ended with signal SIGKILL"):
        workers.wait_until_loaded(kill)


def test_who_waits_for_ranks_may_stop(start, checkpoint):
    def stop():
        raise Cancelled("stopped while loading")

    with pytest.raises(Cancelled):
        start(checkpoint.path).wait_until_loaded(stop)


STARTS_A_RANK = """
import sys, time
from language_server.tensor_parallel.order import Order
from language_server.tensor_parallel.workers import Workers

workers = Workers([Order(sys.argv[1], 1, 2, "cpu", "float32", sys.argv[2], 30.0, 0.8, 1, "info")])
workers.start()
while not workers._workers:
    time.sleep(0.01)
print(workers._workers[0].process.pid, flush=True)
time.sleep(60)
"""


def test_no_rank_outlives_a_server_that_is_killed(checkpoint, tmp_path):
    command = [sys.executable, "-c", STARTS_A_RANK, str(checkpoint.path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None  # asked for
        worker = int(server.stdout.readline())
        assert is_alive(worker)
        server.kill()
    deadline = time.monotonic() + DEADLINE
    while is_alive(worker):
        assert time.monotonic() < deadline, "a rank stayed behind"
        time.sleep(0.05)


# --- messages


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    pair = socket.socketpair()
    ends = Channel(pair[0]), Channel(pair[1])
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    "message",
    [Message(Kind.JOIN), Message(Kind.STEP, (0, -1, 2**62)), Message(Kind.FAILED, (2,), "zu groß: 你好"), None],
    ids=["empty", "numbers", "text", "the end"],
)
def test_a_message_arrives_as_it_was_sent(channels, message):
    here, there = channels
    if message is None:
        here.end()
    else:
        here.send(message)
    assert there.receive() == message


@pytest.mark.parametrize(
    "wrong",
    [struct.pack("<III", 99, 0, 0), struct.pack("<III", 1, 2**30, 0), struct.pack("<III", 1, 0, 1) + b"\xff"],
    ids=["unknown", "too long", "not UTF-8"],
)
def test_what_is_no_message_is_an_error(wrong):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wrong)
        with pytest.raises(InternalError):
            Channel(ours).receive()


def test_gpus_are_taken_from_the_first_one_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(device) for device in rank_devices(torch.device("cuda:2"), 2)] == ["cuda:2", "cuda:3"]
    assert rank_devices(torch.device("cuda"), 1) == [torch.device("cuda")]
    assert rank_devices(CPU, 3) == [CPU] * 3
    with pytest.raises(ConfigError, match="--tensor-parallel-size 4: needs cuda:1 to cuda:4, torch sees 4 GPUs"):
        rank_devices(torch.device("cuda:1"), 4)
