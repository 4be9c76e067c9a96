"""``python -m deploy.cluster.probe ADDRESS KEY``: print what a Ray head holds under one of our keys.

A program of its own: a client of Ray ends its process when the head stays away for long, and whoever needs to know
whether the head is there must not.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from enum import Enum
from typing import Final

NAMESPACE: Final = b"dvd"
_CONNECT_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 5
_DEADLINE_SECONDS: Final = 30.0

ENDED: Final = "ended"
"""Stands under the key of a cluster that was taken down."""


def incarnation_key(name: str) -> str:
    return f"incarnation:{name}"


def ledger_key(name: str) -> str:
    return f"ledger:{name}"


class Answer(Enum):
    """What the head says of us."""

    OURS = "knows this cluster"
    REPLACED = "knows another cluster of this name, or that it was taken down"
    STRANGE = "does not know this cluster"
    UNREACHABLE = "does not answer"


class Probe:
    """Asks again and again, in the background, one question at a time. ``poll`` never blocks for long.

    Args:
        address: of the Ray head.
        name, incarnation: of the cluster.
        environ: with what Ray needs, such as the token.
    """

    def __init__(self, address: str, name: str, incarnation: str, environ: Mapping[str, str]) -> None:
        self._address = address
        self._incarnation = incarnation
        self._command = [sys.executable, "-m", "deploy.cluster.probe", address, incarnation_key(name)]
        self._environ = dict(environ)
        self._process: subprocess.Popen[str] | None = None
        self._deadline = 0.0

    def start(self) -> None:
        """Begin to ask. Not while a question is open."""
        assert self._process is None
        self._deadline = time.monotonic() + _DEADLINE_SECONDS
        if _accepts(self._address):
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environ,
                text=True,
                process_group=0,
            )

    def poll(self) -> Answer | None:
        """None while the answer is not there. After an answer, ``start`` asks again."""
        if self._process is None:
            return Answer.UNREACHABLE
        if self._process.poll() is None and time.monotonic() < self._deadline:
            return None
        process, self._process = self._process, None
        process.kill()
        held, _ = process.communicate()
        return self.judge(held.strip()) if process.returncode == 0 else Answer.UNREACHABLE

    def close(self) -> None:
        """Ask no more."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def judge(self, held: str) -> Answer:
        """What it means that the head holds this under our key."""
        if not held:
            return Answer.STRANGE
        return Answer.OURS if held == self._incarnation else Answer.REPLACED


def _accepts(address: str) -> bool:
    """Whether anybody listens there: most heads that are lost are found out here, without starting a program."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False


def main(argv: list[str]) -> int:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    address, key = argv
    held = GcsClient(address=address).internal_kv_get(key.encode(), NAMESPACE, timeout=_ANSWER_SECONDS)
    print(held.decode() if held else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
