"""A minute of frames made of anything; ``FUZZ_SECONDS`` and ``FUZZ_SEED`` say how long, and which."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from language_server import features
from tests.fuzz.frames import Target, run_blindly, seeds

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
MUST_BE_REACHED = {
    "ok",
    "ticket",
    "size",
    "shape",
    "checksum",
    "nonfinite",
    "duplicate",
    "stale",
    "fingerprint",
    "seal",
    "unsealed",
}


@pytest.mark.timeout(SECONDS + 120)
def test_nothing_but_frames_gets_into_feature_memory():
    # Tests beside this one measure how soon things happen.
    command = [
        "nice",
        "-n",
        "19",
        sys.executable,
        "-m",
        "tests.fuzz.frames",
        "--seconds",
        str(SECONDS),
        "--seed",
        str(SEED),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS + 100)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = dict(re.findall(r"(\w+) (\d+)", done.stdout.partition("frames: ")[2]))
    assert verdicts.keys() >= MUST_BE_REACHED, done.stdout


def test_what_senders_send_is_taken():
    target = Target()
    for data in seeds():
        target(data)
    assert target.verdicts["ok"] > 0


def test_a_hole_would_be_found(monkeypatch):
    monkeypatch.setattr(features, "is_signed_by", lambda header, ticket: True)
    with pytest.raises(AssertionError, match="without a ticket"):
        run_blindly(Target(), 30, seed=SEED)
