"""Compile the Triton kernels for GPUs that are not here: ``python -m tests.language_server.compile_kernels 80 90``.

Prints a JSON object of shared memory in bytes, by kernel and compute capability. Triton brings its own assembler.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from language_server.attention.triton_paged import _QUERY_TILE, _launch
from language_server.kernels import triton_attention, triton_layers

HEAD_DIM, GROUP = 128, 4
SIZES = {
    "HEAD_DIM": HEAD_DIM,
    "DIM_PAD": HEAD_DIM,
    "GROUP": GROUP,
    "GROUP_PAD": 16,
    "BLOCK_SIZE": 16,
    "NUM_SPLITS": 32,
    "QUERY_TILE": _QUERY_TILE,
    "HAS_SINKS": True,
    "WIDTH": 5120,
    "WIDTH_PAD": 8192,
    "TILE": 1024,
    "HAS_NORMS": True,
    "NUM_HEADS": 64,
    "NUM_KV_HEADS": 8,
    "HALF": 64,
    "HALF_PAD": 64,
}
POINTERS = {
    "block_tables": "*i32",
    "seq_lens": "*i32",
    "tiles": "*i32",
    "partials": "*fp32",
    "partial_logs": "*fp32",
    "slots": "*i64",
}
TENSORS = ("query", "keys", "values", "sinks", "out", "hidden", "weight", "qkv", "head_norms", "cos", "sin", "gate_up")
POINTERS |= dict.fromkeys(TENSORS, "*bf16")
NUMBERS = {"scaling": "fp32", "eps": "fp32"} | dict.fromkeys(
    ("window", "query_stride", "head_stride", "table_stride", "slot_stride"), "i32"
)
ALIGNED = (*TENSORS, "partials", "partial_logs", "slots", "query_stride", "head_stride", "slot_stride")


def shared_bytes(kernel, capability, launch):
    constants = {name: value for name, value in (SIZES | launch).items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else (POINTERS | NUMBERS)[name] for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ALIGNED},
    )
    options = {name: value for name, value in launch.items() if name.startswith("num_")}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


def main():
    query = torch.empty(1, GROUP, HEAD_DIM, dtype=torch.bfloat16)
    launches = {
        triton_attention.decode_splits: _launch(query, decode=True),
        triton_attention.join_splits: {},
        triton_attention.prefill_tiles: _launch(query, decode=False),
        triton_layers.rms_norm: {"num_warps": 8},
        triton_layers.rotate_and_cache: {"num_warps": 1},
        triton_layers.silu_and_multiply: {},
    }
    found = {
        f"{kernel.__name__} {capability}": shared_bytes(kernel, int(capability), launch)
        for capability in sys.argv[1:]
        for kernel, launch in launches.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
