"""Loading a role takes that role's weights in memory and little more, whatever else the checkpoint holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import make_checkpoint

MEBIBYTE = 1024 * 1024
VISION_TENSORS = {f"vision_model.encoder.layers.{n}.mlp.fc1.weight": (4096, 1024) for n in range(10)}
LANGUAGE_TENSORS = {f"model.layers.{n}.mlp.up_proj.weight": (8192, 1024) for n in range(10)}

LOAD_IN_A_FRESH_PROCESS = """
import json, pathlib, sys
import torch
from common.model.checkpoint import Checkpoint, load_role
from common.model.config import load_config

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

path, role, dtype, shapes = pathlib.Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]), json.loads(sys.argv[4])
torch.zeros(1000).bfloat16().float()
config = load_config(path)
parameters = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoint = Checkpoint.open(path)
load_role(checkpoint, config, role, parameters)
weights = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
print(json.dumps({"weights": weights, "peak": status("VmHWM") - before, "read": checkpoint.tensor_bytes_read}))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """240 MiB in two shards, each with tensors of both roles: 80 of vision and 160 of language."""
    path = tmp_path_factory.mktemp("large")
    make_checkpoint(path)
    (path / "model.safetensors").unlink()
    disk = VISION_TENSORS | {f"language_model.{name}": shape for name, shape in LANGUAGE_TENSORS.items()}
    weight_map: dict[str, str] = {}
    for index in range(2):
        shard = f"model-{index}.safetensors"
        part = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in list(disk.items())[index::2]}
        save_file(part, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("role", "shapes", "dtype"),
    [("vision", VISION_TENSORS, "bfloat16"), ("language", LANGUAGE_TENSORS, "float32")],
    ids=["vision straight into the parameters", "language converted on the way"],
)
def test_peak_memory_is_at_most_a_fifth_above_the_weights_of_the_role(large_checkpoint, role, shapes, dtype):
    command = [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(large_checkpoint), role, dtype, json.dumps(shapes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    result = subprocess.run(command, check=True, timeout=100, cwd=root, env=environment, stdout=subprocess.PIPE)
    found = json.loads(result.stdout)
    assert found["read"] == (80 if role == "vision" else 160) * MEBIBYTE
    assert found["weights"] == found["read"] * (1 if dtype == "bfloat16" else 2)
    assert 0.95 * found["weights"] < found["peak"] <= 1.2 * found["weights"]
