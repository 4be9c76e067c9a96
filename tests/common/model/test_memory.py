"""What does not fit is refused from the headers, with figures; limits of control groups count."""

import json
from pathlib import Path

import pytest
import torch

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.service.errors import ConfigError

CPU = torch.device("cpu")
GB = 10**9


def sparse_checkpoint(path: Path, shapes: dict[str, list[int]]) -> Checkpoint:
    """A sound checkpoint of BF16 tensors of any size, on a disk of any size: the file has a hole for weights."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    return Checkpoint.open(path)


def test_weights_are_counted_by_role_in_the_dtype_of_computation(tmp_path):
    checkpoint = sparse_checkpoint(
        tmp_path,
        {
            "vision_model.embeddings.class_embedding": [1, 1, 10**9],
            "vision_model.embeddings.mask_token": [1, 1, 10**9],  # of masked pre-training: stays on disk
            "mlp1.1.weight": [1000, 1000],
            "language_model.model.embed_tokens.weight": [10**6, 10**5],
        },
    )
    assert memory.weight_bytes(checkpoint, "vision", torch.bfloat16) == 2 * (10**9 + 10**6)
    assert memory.weight_bytes(checkpoint, "vision", torch.float32) == 4 * (10**9 + 10**6)
    assert memory.weight_bytes(checkpoint, "language", torch.bfloat16) == 200 * GB
    assert (tmp_path / "model.safetensors").stat().st_blocks < 1000


def test_what_fits_says_nothing(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * GB)
    memory.check_fits("vision server", {"weights": 2 * GB, "--kv-cache-bytes": GB}, CPU)


def test_what_does_not_fit_says_what_where_and_what_to_do(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * GB)
    with pytest.raises(ConfigError) as refusal:
        memory.check_fits(
            "language server",
            {"weights": 70 * GB, "--kv-cache-bytes": 68 * GB // 10, "--feature-bytes": 0},
            torch.device("cuda:1"),
        )
    assert refusal.value.message == (
        "the language server needs 76.8 GB (weights 70.0 GB, --kv-cache-bytes 6.8 GB), 24.0 GB free on cuda:1; "
        "use a smaller model, a smaller --kv-cache-bytes or a larger device"
    )


def test_memory_that_runs_out_all_the_same_is_told_in_the_same_words():
    said = "the vision server ran out of memory on cpu while it started"
    with pytest.raises(ConfigError, match=said), memory.explained("vision server", CPU):
        torch.empty(2**50)
    with pytest.raises(ConfigError, match="ran out of memory"), memory.explained("vision server", CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with pytest.raises(RuntimeError, match="a bug"), memory.explained("vision server", CPU):
        raise RuntimeError("a bug")


def test_what_this_machine_has_free():
    assert 0 < memory.free_host_bytes() == pytest.approx(memory.free_bytes(CPU), rel=0.5)


def write_group(path: Path, limit: str, usage: str, most: object, used: int, stat: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / limit).write_text(f"{most}\n")
    (path / usage).write_text(f"{used}\n")
    (path / "memory.stat").write_text(stat)


def test_limits_of_control_groups_v2(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/pod/container\n")
    names = ("memory.max", "memory.current")
    write_group(root / "pod", *names, 8 * GB, 7 * GB, "anon 5\nactive_file 100\ninactive_file 11\n")
    write_group(root / "pod" / "container", *names, "max", GB, "anon 1\n")
    assert list(memory._free_in_cgroups(root, own)) == [GB + 111]
    write_group(root / "pod" / "container", *names, GB, 2 * GB, "anon 1\n")
    assert list(memory._free_in_cgroups(root, own)) == [0, GB + 111]


def test_limits_of_control_groups_v1(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("5:devices:/x\n4:memory:/not/seen/in/a/container\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(root / "memory", *names, 4 * GB, GB, "active_file 7\ntotal_inactive_file 5\n")
    assert list(memory._free_in_cgroups(root, own)) == [3 * GB + 5]


def test_without_control_groups(tmp_path):
    assert list(memory._free_in_cgroups(tmp_path / "cgroup", tmp_path / "own")) == []
