"""A record says what ran, from which code, with which versions, on what."""

import json

from benchmarks.record import environment, write_record


def test_a_record(tmp_path):
    path = write_record(tmp_path / "new", "thing", ["--fast"], {"figure": 1})
    record = json.loads(path.read_bytes())
    assert path.name.endswith("-thing.json")
    assert record["command"] == "python -m benchmarks thing --fast"
    assert record["figures"] == {"figure": 1}
    assert record["hardware"]["cores"] >= 1
    assert {"python", "numpy", "aiohttp"} <= set(record["versions"])


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment("x")["commit"] == "unknown"
