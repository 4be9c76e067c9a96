"""``dvd bench serve`` as a user runs it: against nano, and against what is missing or cannot be."""

import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serve as bench
from benchmarks.profile.turns import Effort
from benchmarks.report import COLUMNS
from benchmarks.settings import BenchServeSettings
from benchmarks.simulator.hardware import HardwareCard
from common.service.errors import ConfigError
from deploy import cli
from deploy.local import LocalDeployment
from tests.end_to_end.conftest import serve

DEADLINE = 90.0


@pytest.fixture(scope="module")
def nano() -> Iterator[LocalDeployment]:
    with serve("nano", enable_per_request_metrics=True) as deployment:
        yield deployment


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "bench", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def records(folder: Path) -> dict:
    (raw,) = folder.glob("*.json")
    return json.loads(raw.read_bytes())


def test_text_and_images_against_nano(nano, tmp_path):
    options = ["--num-prompts", "8", "--concurrency", "3", "--output-tokens", "4", "--input-tokens", "16"]
    more = ["--text-only-share", "0.5", "--ignore-eos", "--goodput", "ttft:60000", "--api-key", "secret"]
    result = run("serve", "--base-url", nano.address, *options, *more, "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar where nobody watches
    for words in ("nano at http://", "closed loop of 3", "requests/s", "first token (TTFT)", "First token by stage"):
        assert words in result.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json"]
    record = records(tmp_path)
    assert "secret" not in "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    (summary,) = record["summaries"]
    assert (summary["num_sent"], summary["num_completed"], summary["num_failed"]) == (8, 8, 0)
    assert summary["mean_output_tokens"] == 4
    assert summary["goodput_per_s"] == summary["requests_per_s"] > 0
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in record["requests"]["load"]]
    assert {row["images"] for row in rows} == {0, 1}
    for row in rows:
        assert (row["output_tokens"], len(row["itl_ms"])) == (4, 3)
        assert (row["image_tokens"] == 256) == (row["images"] == 1)
        assert {"language_queue_ms", "prefill_ms"} <= set(row["stages"])
        assert ({"decode_ms", "encode_ms", "transfer_ms"} <= set(row["stages"])) == (row["images"] == 1)


def test_a_running_deployment_becomes_a_card(nano, tmp_path, capsys, monkeypatch):
    """``dvd profile --url``: a few requests of each kind; every figure has a source."""
    monkeypatch.setattr(Effort, "limit", 60.0)  # on a busy machine, too
    path = tmp_path / "card.json"
    effort = ["--seconds", "0.5", "--rounds", "1", "--hardware", "a core", "--kv-tokens", "9000"]
    loads = ["--image-sizes", "448,896", "--clients", "2", "--lengths", "16", "--batches", "1,2", "--contexts", "64"]
    assert cli.main(["profile", "--url", nano.address, "--output", str(path), *effort, *loads]) == 0
    card = HardwareCard.load(path)
    assert (card.model, card.hardware, card.source.kind) == ("nano", "a core", "measured")
    assert [point.batch for point in card.vision_part().tiles] == [1, 5, 10]
    language = card.language_part()
    assert (language.kv_tokens, len(language.prefill)) == (9000, 1)
    assert [point.batch for point in language.decode] == [1, 2]
    assert language.bytes_per_token % 2 == 0
    assert len(card.transports) == 1
    assert 0 <= card.router.s_per_request < 1
    assert "process_cpu_seconds_total" in card.source.text
    assert "2 sequences at" in capsys.readouterr().out


def test_a_comparison_against_nano(nano, capsys):
    argv = ["--preset", "text-beside-images", "--duration", "0.5", "--base-url", nano.address]
    assert cli.main(["bench", "serve", *argv]) in (0, 1)  # a slow machine may finish no image in that time
    shown = capsys.readouterr().out
    assert "Text beside images" in shown
    assert "beside the others" in shown


def test_nobody_there(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert cli.main(["bench", "serve", "--base-url", f"http://127.0.0.1:{port}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dvd: error: http://127.0.0.1:{port}: no server answers: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["serv"], "unknown benchmark serv; did you mean serve?; see dvd bench --help"),
        (["serve", "--concurency", "3"], "unknown flag --concurency; did you mean --concurrency?"),
        (["serve", "--duration", "3", "--num-prompts", "3"], "--duration: cannot be combined with --num-prompts"),
        (["serve", "--base-url", "nowhere"], "base_url nowhere: expected http://HOST:PORT"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, complaint):
    assert cli.main(["bench", *argv]) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_help(capsys):
    assert cli.main(["bench"]) == cli.main(["bench", "--help"]) == 0
    assert "\n  serve " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "serve", "--help"])
    assert caught.value.code == 0
    assert "--request-rate" in capsys.readouterr().out


def test_variables_of_the_benchmark_are_known(capsys, monkeypatch):
    monkeypatch.setenv("DVD_NUM_PROMPT", "8")
    assert cli.main(["bench", "serve"]) == 2
    assert "unknown variable DVD_NUM_PROMPT; did you mean DVD_NUM_PROMPTS?" in capsys.readouterr().err


def test_without_the_extra(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else find(name))
    assert cli.main(["bench", "serve"]) == 2
    assert capsys.readouterr().err == "dvd: error: dvd bench needs aiohttp: pip install 'dvd-serve[bench]'\n"


def test_the_command_line_itself_needs_no_extra():
    source = (
        "import sys; from deploy import cli; cli.main(['bench']); "
        "sys.exit(bool({'aiohttp', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=60).returncode == 0


def test_bad_figures_are_refused_before_anything_is_sent():
    with pytest.raises(ConfigError, match="--goodput"):
        bench.main(BenchServeSettings.load(["--goodput", "x", "--base-url", "http://127.0.0.1:1"]), [])
