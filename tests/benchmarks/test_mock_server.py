"""It speaks the API that it pretends to be, and leaves with whoever started it."""

import subprocess
import sys

import httpx


def test_it_streams_and_ends_with_its_input():
    command = [sys.executable, "-m", "benchmarks.mock_server", "--tokens-per-second", "500"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        with httpx.Client(base_url=process.stdout.readline().strip(), trust_env=False, timeout=20) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mock"
            lines = client.post("/v1/chat/completions", json={"max_tokens": 3}).text.split("\n\n")
        assert sum('"content":" token"' in line for line in lines) == 3
        assert '"finish_reason":"length"' in lines[4] and '"completion_tokens":3' in lines[5]
        assert lines[-2:] == ["data: [DONE]", ""]
        process.stdin.close()
        assert process.wait(20) == 0
