"""The kernels that the interpreter runs in the other tests are also what a GPU's compiler takes."""

import json
import os
import subprocess
import sys

from language_server.attention import triton_paged

MAX_SHARED_BYTES = 99 * 1024  # of the smallest GPUs since Ampere (8.6, 8.9, 12.0)

if triton_paged.is_available():

    def test_kernels_compile_for_gpus(tmp_path):
        command = [sys.executable, "-m", "tests.language_server.compile_kernels", "80", "90"]
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
        shared = json.loads(found.stdout)
        assert len(shared) == 12
        assert max(shared.values()) <= MAX_SHARED_BYTES
