"""Programs of others, each in an environment of its own (``make clients``), against one system that serves nano.

They do what docs/clients.md shows, word by word: only the address and the directory ``out`` are replaced.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from deploy.local import LocalDeployment
from tests.end_to_end.conftest import serve

ROOT: Final = Path(__file__).parents[2]
ENVIRONMENTS: Final = ROOT / "build" / "clients"
SHOWN: Final = (ROOT / "docs" / "clients.md").read_text("utf-8")
ADDRESS: Final = "http://127.0.0.1:8000"
TIMEOUT: Final = 100
OURS: Final = ("PYTHON", "OMP_", "TRITON_", "PYTEST_", "HF_", "OPENAI_", "COV_")
"""Variables of this process that are none of a client's."""


@pytest.fixture(scope="session")
def nano() -> Iterator[LocalDeployment]:
    with serve("nano") as deployment:
        yield deployment


def shown(name: str, address: str, out: Path) -> str:
    """The block of docs/clients.md, with another address and another directory."""
    (text,) = re.findall(rf"<!-- client: {name} -->\n```\w+\n(.*?)```", SHOWN, re.DOTALL)
    return re.sub(r"\bout\b", str(out), text.replace(ADDRESS, address))


def run_shown(name: str, address: str, out: Path, **environ: str) -> str:
    """The command that docs/clients.md shows; what it writes to stdout."""
    program, *arguments = shlex.split(shown(name, address, out).removeprefix("$ "))
    return run_client(name, program, *arguments, home=out, **environ)


def run_client(environment: str, program: str, *arguments: str, home: Path, **environ: str) -> str:
    """A program of one environment, run to its end, which must be a good one; what it writes to stdout."""
    path = ENVIRONMENTS / environment / "bin" / program
    assert path.exists(), f"{path} is missing: make clients"
    result = subprocess.run(
        [path, *arguments], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, env=_environ(home) | environ
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def _environ(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return inherited | {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # the one that comes with it: nothing is fetched
        "no_proxy": "127.0.0.1",
    }
